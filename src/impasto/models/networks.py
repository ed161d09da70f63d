"""Networks from disk: a diffusers folder or a single-file checkpoint becomes loaded modules, or a clear error.

Knows diffusers and transformers. Knows no requests, samplers or noise levels, and nothing of what the networks are
for: that is ``sdxl``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from impasto.errors import ModelError
from impasto.models.catalog import BUILTIN_FOLDER, ModelSource
from impasto.models.checkpoint import ALL, END_TOKEN, Checkpoint, read_checkpoint
from impasto.models.kinds import UNET_CHANNELS, Kind
from impasto.models.original import State, text_config, unet_config, vae_config

SIZE_IDS: dict[Kind, int] = {"base": 6, "inpaint": 6, "refiner": 5}  # numbers that join the pooled text embedding
_TEXT_PARTS: dict[Kind, tuple[str, ...]] = {
    "base": ("text_encoder", "text_encoder_2"),
    "inpaint": ("text_encoder", "text_encoder_2"),
    "refiner": ("text_encoder_2",),
}
_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_ACTIVATIONS = {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}  # OpenAI's CLIP, and OpenCLIP


@dataclass(frozen=True, slots=True)
class Dtypes:
    """What each part runs in."""

    unet: torch.dtype
    vae: torch.dtype
    text: torch.dtype

    @classmethod
    def all(cls, dtype: torch.dtype) -> Dtypes:
        """Run everything in one dtype."""
        return cls(dtype, dtype, dtype)


@dataclass(frozen=True, slots=True)
class Devices:
    """Where each part runs; the latents live where the UNet is."""

    unet: torch.device
    vae: torch.device
    text: torch.device

    @classmethod
    def all(cls, device: torch.device) -> Devices:
        """Run everything in one place."""
        return cls(device, device, device)


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """What a source holds, on the CPU, ready to run; parts not asked for are ``None`` or empty.

    Attributes:
        kind: ``base``, ``inpaint`` or ``refiner``.
        text_encoders: CLIP-L and bigG, or bigG alone for a refiner; ``tokenizers`` likewise.
        scheduler_config: The noise schedule's configuration, in diffusers' words.
        zero_absent_negative: Whether an absent negative prompt means zeros (``force_zeros_for_empty_prompt``).
        aesthetic: Whether an aesthetic score takes the place of the target size (``requires_aesthetics_score``).
    """

    kind: Kind
    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler_config: dict[str, Any]
    zero_absent_negative: bool
    aesthetic: bool


def load_networks(source: ModelSource, dtypes: Dtypes, *, parts: Collection[str] = ALL) -> Networks:
    """Load the networks of a diffusers folder or a single-file checkpoint.

    Args:
        source: Where they are.
        dtypes: What each part runs in. A VAE that says it overflows float16 (``force_upcast``; SDXL's own does, into
            black pictures) is loaded in float32 instead.
        parts: Which of ``unet``, ``vae``, ``text`` to load.

    Raises:
        ModelError: A part is missing, cut short or of another kind; the message names the part.
    """
    with _no_progress_bars():
        networks = (_from_folder if source.path.is_dir() else _from_checkpoint)(source, dtypes, parts)
    for network in (networks.unet, networks.vae, *networks.text_encoders):
        if network is not None:
            network.requires_grad_(False).eval()
    return networks


def _vae_dtype(asked: torch.dtype, config: dict[str, Any]) -> torch.dtype:
    return torch.float32 if asked == torch.float16 and config.get("force_upcast", True) else asked


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal: callers show their own progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _from_folder(source: ModelSource, dtypes: Dtypes, parts: Collection[str]) -> Networks:
    text = _TEXT_PARTS[source.kind] if "text" in parts else ()
    unet = _load_network(UNet2DConditionModel, source, "unet", dtypes.unet) if "unet" in parts else None
    if unet is not None and UNET_CHANNELS.get(unet.config.in_channels) is None:
        raise ModelError(f"model {source.name!r}: unet reads {unet.config.in_channels} channels; SDXL's read 4 or 9")
    vae = None
    if "vae" in parts:
        vae = _load_network(AutoencoderKL, source, "vae", _vae_dtype(dtypes.vae, _read_json(source, "vae/config.json")))
    return Networks(
        kind=source.kind,
        unet=unet,
        vae=vae,
        text_encoders=tuple(_load_network(_CLASSES[part], source, part, dtypes.text) for part in text),
        tokenizers=_tokenizers(source.name, source.path, text),
        scheduler_config=_read_json(source, "scheduler/scheduler_config.json"),
        zero_absent_negative=bool(source.index.get("force_zeros_for_empty_prompt", True)),
        aesthetic=source.kind == "refiner",
    )


def _load_network(kind: Any, source: ModelSource, part: str, dtype: torch.dtype) -> Any:
    folder = source.path / part
    plain = list(folder.glob("*.safetensors"))
    if not plain:
        raise ModelError(f"model {source.name!r}: {part} has no .safetensors file (pickles are not loaded)")
    variant = "fp16" if all(".fp16." in path.name or ".fp16-" in path.name for path in plain) else None
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        network, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {source.name!r}: {part} cannot be loaded: {str(error).splitlines()[0]}") from error
    # The libraries fill what is missing with random numbers and only warn.
    wrong = sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ModelError(f"model {source.name!r}: {part}: {len(wrong)} tensors missing or unknown, first {wrong[0]!r}")
    return network


def _tokenizers(name: str, folder: Path, text_parts: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(_tokenizer(name, folder / part.replace("text_encoder", "tokenizer")) for part in text_parts)


def _tokenizer(name: str, folder: Path) -> Any:
    files = {path.name for path in folder.glob("*")}
    # Without its files the library makes one that knows no words, and says nothing.
    if not any(whole <= files for whole in ({"tokenizer.json"}, {"vocab.json", "merges.txt"})):
        raise ModelError(f"model {name!r}: {folder.name} has neither tokenizer.json nor vocab.json with merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ModelError(f"model {name!r}: {folder.name} cannot be loaded: {str(error).splitlines()[0]}") from error


def _from_checkpoint(source: ModelSource, dtypes: Dtypes, parts: Collection[str]) -> Networks:
    """Build the networks from a single file; the tokenizers, which no checkpoint has, are CLIP's own."""
    found = read_checkpoint(source.path, source.name, parts)
    text = _TEXT_PARTS[found.kind] if "text" in parts else ()
    return Networks(
        kind=found.kind,
        unet=_build(found, "unet", dtypes.unet, _unet) if "unet" in parts else None,
        vae=_build(found, "vae", _vae_dtype(dtypes.vae, {}), _vae) if "vae" in parts else None,
        text_encoders=tuple(_build(found, part, dtypes.text, _text_encoder) for part in text),
        tokenizers=_tokenizers(source.name, BUILTIN_FOLDER, text),
        scheduler_config=found.scheduler_config,
        zero_absent_negative=found.kind != "refiner",
        aesthetic=found.kind == "refiner",
    )


def _unet(found: Checkpoint, part: str) -> nn.Module:
    config = unet_config(found.networks[part], pooled=found.pooled, size_ids=SIZE_IDS[found.kind])
    return UNet2DConditionModel(**config)  # type: ignore[no-any-return]


def _vae(found: Checkpoint, part: str) -> nn.Module:
    return AutoencoderKL(**vae_config(found.networks[part]))  # type: ignore[no-any-return]


def _text_encoder(found: Checkpoint, part: str) -> nn.Module:
    config = text_config(found.networks[part], activation=_ACTIVATIONS[part], end_token=END_TOKEN)
    return _CLASSES[part](CLIPTextConfig(**config))  # type: ignore[no-any-return]


def _build(found: Checkpoint, part: str, dtype: torch.dtype, make: Callable[[Checkpoint, str], nn.Module]) -> nn.Module:
    """Make a network without memory of its own and give it the tensors, every one of them."""
    try:
        with torch.device("meta"):
            network = make(found, part)
    except (KeyError, StopIteration, ValueError, IndexError) as error:  # a tensor that tells a size is not there
        raise ModelError(f"model {found.name!r}: {part}: tensors are missing, such as {error}") from None
    expected = network.state_dict()
    state = _fitted(found.networks[part], expected, dtype)
    odd = {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
    wrong = sorted((expected.keys() ^ state.keys()) | odd)
    if wrong:
        raise ModelError(
            f"model {found.name!r}: {part}: {len(wrong)} tensors missing, unknown or of another shape, "
            f"first {wrong[0]!r}"
        )
    network.load_state_dict(state, assign=True)
    for module in network.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:  # a buffer that no file stores
            module.position_ids = torch.arange(ids.shape[-1]).expand(ids.shape)
    return network


def _fitted(state: State, expected: State, dtype: torch.dtype) -> State:
    # transformers dropped "text_model." from one of the encoders; files have it.
    return {key if key in expected else key.removeprefix("text_model."): t.to(dtype) for key, t in state.items()}


def _read_json(source: ModelSource, name: str) -> dict[str, Any]:
    try:
        return json.loads((source.path / name).read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source.name!r}: {name} cannot be read ({type(error).__name__})") from None
