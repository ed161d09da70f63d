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
MAX_SHOWN = 100  # characters of a key repeated in an error
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
        path: An existing ``.safetensors`` file.
        names: The model's modules.
        field: Path of the request field that named the file, for the error.

    Raises:
        LoraError: Not safetensors, a kind this version does not know, keys of another model, or
            numbers that are not finite.
    """
    groups = _group(_tensors(path, field), field)
    patches: Patches = {}
    unknown: list[str] = []
    for name, parts in groups.items():
        target = names.find(name)
        if target is None:
            unknown.append(name)
        elif target in patches:
            raise LoraError(field, f"names module {target.module!r} twice, in two spellings")
        else:
            patches[target] = _low_rank(name, parts, field)
    if unknown:
        raise LoraError(
            field,
            f"is not for this model: {len(unknown)} of {len(groups)} modules are not in it, "
            f"first {unknown[0][:MAX_SHOWN]!r}",
        )
    return patches


def _tensors(path: Path, field: str) -> dict[str, Tensor]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise LoraError(field, f"is larger than {MAX_FILE_BYTES >> 30} GiB, so it is no LoRA")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned, because a tensor is a view of the file's pages, and the file may be overwritten while we keep it.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise LoraError(field, f"is not a safetensors file ({error})") from None


def _group(tensors: dict[str, Tensor], field: str) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            raise LoraError(field, f"holds {key[:MAX_SHOWN]!r}: this version reads low-rank LoRAs (kohya or PEFT)")
        group = groups.setdefault(key.removesuffix(suffix), {})
        if SUFFIXES[suffix] in group:
            raise LoraError(field, f"has two {SUFFIXES[suffix]!r} tensors for module {key[:MAX_SHOWN]!r}")
        group[SUFFIXES[suffix]] = tensor
    if not groups:
        raise LoraError(field, "holds no tensors")
    return groups


def _low_rank(name: str, parts: dict[str, Tensor], field: str) -> LowRank:
    module = f"module {name[:MAX_SHOWN]!r}"
    if not {"down", "up"} <= parts.keys():
        raise LoraError(field, f"is incomplete: {module} has only {', '.join(sorted(parts))}")
    down, up, alpha = parts["down"], parts["up"], parts.get("alpha")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or 0 in (*down.shape, *up.shape):
        raise LoraError(field, f"has a malformed {module}: {tuple(down.shape)} and {tuple(up.shape)}")
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(field, f"has an alpha that is not one number in {module}")
    scale = 1.0 if alpha is None else alpha.float().item() / down.shape[0]
    if not (math.isfinite(scale) and bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())):
        raise LoraError(field, f"has numbers that are not finite in {module}")
    return LowRank(down, up, scale)
