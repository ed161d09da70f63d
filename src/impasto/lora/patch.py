"""Patches: what a LoRA does to one parameter, as a formula; and the low-rank one, which is most of them.

Knows tensors and maths. Knows no files, names or models. The other kinds are in ``patches``, one file a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


class Patch(Protocol):
    """What a LoRA does to one parameter; one class for each kind, with its closed formula."""

    kind: ClassVar[str]  # for the report: ``LoRA``, ``LoHa``, …
    additive: ClassVar[bool]  # whether ``patched`` adds ``strength * delta``, so that the order of a stack is free

    @property
    def rank(self) -> int | None:
        """Inner dimension, where the kind has one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it is for, as far as its tensors tell."""

    def fits(self, shape: torch.Size) -> bool:
        """Whether it is for a parameter of this shape."""

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the new parameter, float32 and of ``weight``'s shape; at strength 0 exactly ``weight``."""

    def factors(self) -> Factors | None:
        """Return ``left [out, r]`` and ``right [r, in]``, float32, whose product is added at strength 1.

        ``None`` where the kind is not a low-rank sum. ``in`` counts a convolution's window too.
        """
        return None


def interchangeable(ours: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a delta of shape ``ours`` is for a weight of ``shape``: 1x1 windows may be left out, or flattened in."""
    if not ours or not shape or ours[0] != shape[0]:
        return False
    if len(ours) == 2:
        return ours[1] == torch.Size(shape[1:]).numel()
    return ours == shape if len(ours) == len(shape) else ours == (*shape, 1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Patch):
    """``W' = W + strength * scale * up @ down``.

    Attributes:
        down: ``[r, in]``, or ``[r, in, kh, kw]`` for a convolution.
        up: ``[out, r]``, or ``[out, r, 1, 1]``.
        scale: ``alpha / r``; 1 where the file has no alpha.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; convolutions as in LoCon.
    """

    kind: ClassVar[str] = "LoRA"
    additive: ClassVar[bool] = True

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in]`` or ``[out, in, kh, kw]``."""
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, shape: torch.Size) -> bool:
        """Whether the delta has the shape of a weight (1x1 convolutions and linears are interchangeable)."""
        return self.up[0].numel() == self.rank and interchangeable(self.shape, tuple(shape))

    def factors(self) -> Factors:
        """Return both halves as matrices, the scale in the left one."""
        return self.up.float().flatten(1) * self.scale, self.down.float().flatten(1)

    def delta(self, shape: torch.Size) -> Tensor:
        """Return what is added at strength 1: float32, of the weight's shape."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(shape)

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return ``weight + strength * delta``, float32."""
        if strength == 0:
            return weight.float()
        return weight.float() + strength * self.delta(weight.shape).to(weight.device)
