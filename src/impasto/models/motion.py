"""Motion adapters: layers between the frames of a video, from disk and onto an SDXL UNet that is loaded already.

Knows diffusers' motion networks and adapter folders. Knows no requests, samplers or noise levels.

The UNet's own layers are shared, not copied: the video network costs no more memory than its motion layers, and a LoRA
that is on the UNet is on the video network too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import MotionAdapter, UNetMotionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from impasto.errors import ModelError
from impasto.models.catalog import BUILTIN, BUILTIN_FOLDER, HUB_ID
from impasto.models.hub import fetch_adapter

MOTION: Final = "motion_modules"
BUILTIN_MOTION: Final = BUILTIN_FOLDER / "motion"
WEIGHTS: Final = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors")
_CLOCK: Final = ".pos_embed.pe"  # numbers that count up, which some files leave out
_ENDS: Final = (
    "conv_in", "time_proj", "time_embedding", "add_time_proj", "add_embedding", "conv_norm_out", "conv_act", "conv_out",
)  # fmt: skip
_PARTS: Final = ("resnets", "attentions", "downsamplers", "upsamplers")


def find_adapter(name: str) -> Path:
    """Find the folder of the motion adapter called ``name``.

    Args:
        name: ``builtin``; the path of a folder with ``config.json``; or ``owner/name`` of the hub, also ``@revision``.

    Raises:
        ModelError: There is none.
    """
    if name == BUILTIN:
        return BUILTIN_MOTION
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    match = HUB_ID.fullmatch(name)
    if match is None or match["file"] is not None:
        raise ModelError(
            f"motion adapter {name!r} was not found: give 'builtin', the path of a folder with config.json, "
            "or a hub repository as owner/name"
        )
    return fetch_adapter(match["repo"], match["revision"], ("config.json", *WEIGHTS))


def load_adapter(name: str) -> Any:
    """Load a motion adapter on the CPU.

    Raises:
        ModelError: There is none, it is of another kind, or weights are missing or left over.
    """
    folder = find_adapter(name)
    config = _config(name, folder)
    file = next((folder / weights for weights in WEIGHTS if (folder / weights).is_file()), None)
    if file is None:
        raise ModelError(f"motion adapter {name!r} has none of {', '.join(WEIGHTS)} (pickles are not loaded)")
    try:
        adapter = MotionAdapter.from_config(config)
        state = load_file(file)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"motion adapter {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    expected = adapter.state_dict()
    own = {key for key in expected if not key.endswith(_CLOCK)}
    odd = {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
    wrong = sorted((own - state.keys()) | (state.keys() - expected.keys()) | odd)
    if wrong:
        raise ModelError(
            f"motion adapter {name!r}: {len(wrong)} tensors missing, unknown or of another shape, first {wrong[0]!r}"
        )
    adapter.load_state_dict(state, strict=False)
    return adapter.requires_grad_(False).eval()


def with_motion(unet: Any, adapter: Any, name: str = "motion adapter") -> Any:
    """Return a video network made of a UNet's own layers and an adapter's, the very modules.

    Its input is ``[videos, 4, frames, h, w]``. (diffusers' ``from_unet2d`` copies the layers instead, and leaves out
    ``add_embedding``, by which SDXL reads sizes and the pooled prompt.)

    Raises:
        ModelError: The adapter was made for another UNet.
    """
    try:
        with torch.device("meta"):
            video = UNetMotionModel.from_unet2d(unet, _Shape(adapter.config), load_weights=False)
    except (ValueError, TypeError, IndexError) as error:
        raise ModelError(f"{name} does not fit this model: {error}") from None
    for part in _ENDS:
        setattr(video, part, getattr(unet, part))
    for block, spatial, motion in _blocks(video, unet, adapter):
        for part in _PARTS:
            if getattr(spatial, part, None) is not None:
                setattr(block, part, getattr(spatial, part))
        if motion is not None:
            block.motion_modules = motion.motion_modules
    _check(video, unet, name)
    return video.requires_grad_(False).eval()


def motion_layers(video: Any) -> dict[str, nn.Module]:
    """Return what an adapter brought to a video network, by the names that adapters' files have."""
    return {name: module for name, module in video.named_modules() if name.endswith(MOTION)}


def longest(adapter: Any) -> int:
    """Return the most frames that an adapter can tell apart."""
    return int(adapter.config.motion_max_seq_length)


def _config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"motion adapter {name!r}: config.json cannot be read ({type(error).__name__})") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "MotionAdapter":
        raise ModelError(f"{name!r} is a {kind}, not a MotionAdapter")
    if config.get("conv_in_channels"):
        raise ModelError(f"motion adapter {name!r} reads pictures beside the latents (PIA); such are not supported")
    return dict(config)


@dataclass(frozen=True, slots=True)
class _Shape:
    """An adapter's configuration alone: all that is asked of it where no weights are copied."""

    config: Any

    def to(self, **_: object) -> None:
        """Nothing to move."""


def _blocks(video: Any, unet: Any, adapter: Any) -> Iterator[tuple[Any, Any, Any]]:
    yield from zip(video.down_blocks, unet.down_blocks, adapter.down_blocks, strict=True)
    yield video.mid_block, unet.mid_block, adapter.mid_block
    yield from zip(video.up_blocks, unet.up_blocks, adapter.up_blocks, strict=True)


def _check(video: Any, unet: Any, name: str) -> None:
    """Make sure that every layer of the UNet is there, none more, and every weight is real and of the right width."""
    spatial = {key for key in video.state_dict() if f".{MOTION}." not in key}
    if spatial != set(unet.state_dict()) or any(tensor.is_meta for tensor in video.state_dict().values()):
        raise ModelError(f"{name} does not fit this model: its blocks are others")
    for block in (*video.down_blocks, video.mid_block, *video.up_blocks):
        for resnet, layer in zip(block.resnets, getattr(block, MOTION, ()), strict=False):
            if resnet.out_channels != layer.in_channels:
                raise ModelError(f"{name} does not fit this model: it is made for one of another width")
