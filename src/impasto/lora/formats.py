"""LoRA files: bytes on disk to patches by module; anything not understood is an error, never passed over.

Knows the safetensors format and the low-rank suffixes (kohya, PEFT). Knows no model beyond the names it is given.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from impasto.errors import LoraError
from impasto.lora.keys import Target, TargetNames
from impasto.lora.patch import LowRank

MAX_FILE_BYTES = 2 * 2**30
SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}

Patches = dict[Target, LowRank]


def read_lora(path: Path, names: TargetNames, field: str = "loras") -> Patches:
    """Read a LoRA file into one patch a module.

    Args:
        path: A ``.safetensors`` file.
        names: The model's modules.
        field: Path of the request field that named the file, for the error.

    Raises:
        LoraError: Missing, not safetensors, a kind this version does not know, keys of another model, or
            numbers that are not finite.
    """
    groups = _group(_tensors(path, field), field)
    patches: Patches = {}
    unknown: list[str] = []
    for name, parts in groups.items():
        target = names.find(name)
        if target is None:
            unknown.append(name)
        else:
            patches[target] = _low_rank(name, parts, field)
    if unknown:
        raise LoraError(
            field,
            f"is not for this model: {len(unknown)} of {len(groups)} modules are not in it, first {unknown[0]!r}",
        )
    return patches


def _tensors(path: Path, field: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise LoraError(field, f"was not found: {path.name!r} is not a file here")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise LoraError(field, f"is larger than {MAX_FILE_BYTES >> 30} GiB, so it is no LoRA")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise LoraError(field, f"is not a safetensors file ({error})") from None


def _group(tensors: dict[str, Tensor], field: str) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            raise LoraError(field, f"holds {key!r}: this version reads plain low-rank LoRAs (kohya or PEFT)")
        groups.setdefault(key.removesuffix(suffix), {})[SUFFIXES[suffix]] = tensor
    if not groups:
        raise LoraError(field, "holds no tensors")
    return groups


def _low_rank(name: str, parts: dict[str, Tensor], field: str) -> LowRank:
    if not {"down", "up"} <= parts.keys():
        raise LoraError(field, f"is incomplete: module {name!r} has only {', '.join(sorted(parts))}")
    down, up = parts["down"], parts["up"]
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or 0 in (*down.shape, *up.shape):
        raise LoraError(field, f"has a malformed module {name!r}: {tuple(down.shape)} and {tuple(up.shape)}")
    rank = down.shape[0]
    scale = parts["alpha"].float().item() / rank if "alpha" in parts else 1.0
    if not (math.isfinite(scale) and bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())):
        raise LoraError(field, f"has numbers that are not finite in module {name!r}")
    return LowRank(down, up, scale)
