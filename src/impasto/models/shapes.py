"""Names and shapes of a model's parameters, read off the headers of its files: nothing is loaded.

Knows folders in diffusers' layout and single-file checkpoints. Knows no LoRAs, and no classes of networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from impasto.errors import ModelError
from impasto.models import kinds, original
from impasto.models.catalog import ModelSource
from impasto.models.header import read_header

Shapes = dict[str, dict[str, tuple[int, ...]]]  # network -> parameter, such as ``conv_in.weight`` -> shape

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")  # tables, which LoRAs do not patch
_BASE = {"unet": kinds.UNET, "text_encoder": kinds.CLIP_L, "text_encoder_2": kinds.CLIP_G}
_REFINER = {"unet": kinds.UNET, "text_encoder_2": kinds.CLIP_G_ALONE}
_CONVERT: Mapping[str, Callable[[original.State], original.State]] = {
    "unet": original.convert_unet,
    "text_encoder": dict,
    "text_encoder_2": original.convert_clip_g,
}


def parameter_shapes(source: ModelSource) -> Shapes:
    """Return the shape of every weight and bias that a LoRA could patch, by network and by diffusers' name.

    A refiner's UNet is called ``refiner``, as where it runs beside a base model.

    Raises:
        ModelError: A file is missing, broken or not SDXL's.
    """
    found = _of_checkpoint(source) if source.path.is_file() else _of_folder(source)
    shapes = {network: _patchable(header) for network, header in found.items()}
    if source.kind == "refiner":
        return {"refiner": shapes["unet"]}
    return shapes


def _patchable(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for name, shape in shapes.items()
        if name.endswith((".weight", ".bias")) and not name.endswith(_EMBEDDINGS)
    }


def _of_folder(source: ModelSource) -> Shapes:
    """Read every safetensors file of each network's folder: one, or the parts of a large one."""
    found: Shapes = {}
    for network in NETWORKS:
        folder = source.path / network
        if not folder.is_dir():
            continue
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"model {source.name!r}: {network} has no .safetensors file")
        found[network] = {key: info.shape for file in files for key, info in read_header(file, source.name).items()}
    return found


def _of_checkpoint(source: ModelSource) -> Shapes:
    """Translate the names by passing tensors without data through the same functions that loading uses."""
    header = read_header(source.path, source.name)
    prefixes = _REFINER if source.kind == "refiner" else _BASE
    found: Shapes = {}
    for network, prefix in prefixes.items():
        state = {
            key.removeprefix(prefix): torch.empty(info.shape, device="meta")
            for key, info in header.items()
            if key.startswith(prefix) and not original.NOT_WEIGHTS.match(key)
        }
        try:
            converted = _CONVERT[network](state)
        except (KeyError, ValueError, RuntimeError):
            raise ModelError(f"model {source.name!r}: {network} has names or shapes that are not SDXL's") from None
        found[network] = {key: tuple(tensor.shape) for key, tensor in converted.items()}
    return found
