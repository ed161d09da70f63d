"""What a file of tensors is, told from its header alone: whose LoRA, or no LoRA but what.

Knows how a header's tensors become modules with the width they read; the families' signs are in ``bases``. Reads no
tensor, knows no model and imports no torch, so that a file can be named before anything is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from impasto.lora import bases
from impasto.lora.gate import Header
from impasto.lora.tensors import sort_keys

# The part of an adapter whose second axis is as wide as its module's input.
_INPUT_PARTS: Final = ("down", "hada_w1_b", "diff", "b2")
_KRONECKER: Final = (("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_b"))  # whose widths multiply
_NOTHING_ALONE: Final = {"alpha"}
_WEIGHT: Final = ".weight"
# Prefixes of the text encoders in whole checkpoints, which differ in every family.
_CHECKPOINTS: Final = (
    (re.compile(r"conditioner\.embedders\.1\."), bases.SDXL),
    (re.compile(r"conditioner\.embedders\.0\."), bases.REFINER),
    (re.compile(r"cond_stage_model\.transformer\."), bases.SD1),
    (re.compile(r"cond_stage_model\.model\."), bases.SD2),
)

Shapes = Mapping[str, tuple[int, ...]]


def base_model(header: Header) -> str:
    """Return the family a file is for: ``SDXL``, ``SDXL refiner``, ``SD 1.5``, ``Flux``, …, or ``unknown``."""
    shapes = {key: info.shape for key, info in header.tensors.items()}
    for pattern, family in _CHECKPOINTS:
        if any(pattern.match(key) for key in shapes):
            return family
    return bases.base_of(_adapted(shapes) or _plain(shapes), header.metadata)


def describe(header: Header) -> str:
    """Say what a file is, for a sentence: ``a Flux LoRA``, ``a whole SDXL checkpoint``, ``a ControlNet``, ….

    A LoRA's family is left out where nothing tells it: ``a LoRA``.
    """
    shapes = {key: info.shape for key, info in header.tensors.items()}
    family = base_model(header)
    named = "" if family == bases.UNKNOWN else family.removeprefix("a ") + " "
    if _adapted(shapes):
        return f"{_article(named)} {named}LoRA"
    other, _, _ = (bases.not_a_lora(shapes) or "no LoRA of a known kind").partition(", not a LoRA")
    whole = "a whole "
    return f"{whole}{named}{other.removeprefix(whole)}" if other.startswith(whole) else other


def _article(named: str) -> str:
    return "an" if named.startswith(("SD", "A")) else "a"


def _adapted(shapes: Shapes) -> dict[str, tuple[int, ...] | None]:
    """Return the modules that have an adapter, with ``(0, inputs)`` of the weight it is for where that is told."""
    return {
        name: _weight_of(parts, shapes)
        for name, parts in sort_keys(shapes).modules.items()
        if not parts.keys() <= _NOTHING_ALONE
    }


def _weight_of(parts: Mapping[str, str], shapes: Shapes) -> tuple[int, int] | None:
    def width(*names: str) -> int:
        found = (shapes[parts[name]] for name in names if name in parts)
        return next((shape[1] for shape in found if len(shape) > 1), 0)

    inputs = width(*_INPUT_PARTS) or math.prod(width(*factor) for factor in _KRONECKER)
    return (0, inputs) if inputs else None


def _plain(shapes: Shapes) -> dict[str, tuple[int, ...] | None]:
    """Return a whole network's modules with the shapes of their weights."""
    return {key.removesuffix(_WEIGHT): shape for key, shape in shapes.items() if key.endswith(_WEIGHT)}
