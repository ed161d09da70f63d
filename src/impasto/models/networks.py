"""Networks from disk: a diffusers folder or a single-file checkpoint becomes loaded modules, or a clear error.

Knows diffusers and transformers, and is the only file that does. Knows no requests, samplers or noise levels, and
nothing of what the networks are for: that is ``sdxl``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from impasto.models.checkpoint import END_TOKEN, read_checkpoint
from impasto.models.original import State, text_config, unet_config, vae_config


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """What a source holds, on the CPU in the asked dtype, ready to run."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizers: tuple[Any, ...]  # of the two encoders
    scheduler_config: dict[str, Any]


def load_networks(source: ModelSource, dtype: torch.dtype) -> Networks:
    """Load every network of a diffusers folder or a single-file checkpoint.

    Raises:
        ModelError: A part is missing, cut short or of another kind; the message names the part.
    """
    with _no_progress_bars():
        networks = _from_folder(source, dtype) if source.path.is_dir() else _from_checkpoint(source, dtype)
    if dtype == torch.float16 and networks.vae.config.force_upcast:
        networks.vae.float()  # SDXL's own VAE overflows float16 (black pictures); its configuration says so
    for network in (networks.unet, networks.vae, networks.text_encoder, networks.text_encoder_2):
        network.requires_grad_(False).eval()
    return networks


def _tokenizers(folder: Path) -> tuple[Any, ...]:
    return tuple(
        CLIPTokenizer.from_pretrained(folder / part, local_files_only=True) for part in ("tokenizer", "tokenizer_2")
    )


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


def _from_folder(source: ModelSource, dtype: torch.dtype) -> Networks:
    return Networks(
        unet=_load_network(UNet2DConditionModel, source, "unet", dtype),
        vae=_load_network(AutoencoderKL, source, "vae", dtype),
        text_encoder=_load_network(CLIPTextModel, source, "text_encoder", dtype),
        text_encoder_2=_load_network(CLIPTextModelWithProjection, source, "text_encoder_2", dtype),
        tokenizers=_tokenizers(source.path),
        scheduler_config=_read_json(source, "scheduler/scheduler_config.json"),
    )


def _load_network(kind: Any, source: ModelSource, part: str, dtype: torch.dtype) -> Any:
    folder = source.path / part
    plain = list(folder.glob("*.safetensors"))
    if not plain:
        raise ModelError(f"model {source.name!r}: {part} has no .safetensors file (pickles are not loaded)")
    variant = "fp16" if all(".fp16." in path.name for path in plain) else None
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


def _from_checkpoint(source: ModelSource, dtype: torch.dtype) -> Networks:
    """Build the networks from a single file; the tokenizers, which no checkpoint has, are CLIP's own."""
    found = read_checkpoint(source.path, source.name)
    first = text_config(found.text_encoder, activation="quick_gelu", end_token=END_TOKEN)
    second = text_config(found.text_encoder_2, activation="gelu", end_token=END_TOKEN)
    build = partial(_build, source.name, dtype)
    return Networks(
        unet=build("UNet", lambda: UNet2DConditionModel(**unet_config(found.unet)), found.unet),
        vae=build("VAE", lambda: AutoencoderKL(**vae_config(found.vae)), found.vae),
        text_encoder=build("text encoder", lambda: CLIPTextModel(CLIPTextConfig(**first)), found.text_encoder),
        text_encoder_2=build(
            "text encoder 2", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**second)), found.text_encoder_2
        ),
        tokenizers=_tokenizers(BUILTIN_FOLDER),
        scheduler_config=found.scheduler_config,
    )


def _build(name: str, dtype: torch.dtype, part: str, make: Callable[[], nn.Module], state: State) -> nn.Module:
    """Make a network without memory of its own and give it the tensors, every one of them."""
    try:
        with torch.device("meta"):
            network = make()
    except (KeyError, StopIteration, ValueError) as error:  # a tensor that tells a size is not there
        raise ModelError(f"model {name!r}: {part}: tensors are missing, such as {error}") from None
    expected = network.state_dict().keys()
    # transformers dropped "text_model." from one of the encoders; files have it.
    state = {key if key in expected else key.removeprefix("text_model."): t.to(dtype) for key, t in state.items()}
    wrong = sorted(expected ^ state.keys())
    if wrong:
        raise ModelError(f"model {name!r}: {part}: {len(wrong)} tensors missing or unknown, first {wrong[0]!r}")
    network.load_state_dict(state, assign=True)
    for module in network.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:  # a buffer that no file stores
            module.position_ids = torch.arange(ids.shape[-1]).expand(ids.shape)
    return network


def _read_json(source: ModelSource, name: str) -> dict[str, Any]:
    try:
        return json.loads((source.path / name).read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source.name!r}: {name} cannot be read ({type(error).__name__})") from None
