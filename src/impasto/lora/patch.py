"""Patches: what a LoRA does to one weight, as a formula.

Knows tensors and the maths of each kind. Knows no files, names or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Patch(Protocol):
    """What a LoRA does to one parameter; one class for each kind, with its closed formula."""

    kind: ClassVar[str]  # for the report: ``LoRA``, ``LoHa``, …
    additive: ClassVar[bool]  # whether ``patched`` adds ``strength * delta``, so that the order of a stack is free

    @property
    def rank(self) -> int | None:
        """Inner dimension, where the kind has one."""

    def fits(self, shape: torch.Size) -> bool:
        """Whether it is for a parameter of this shape."""

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the new parameter, float32 and of ``weight``'s shape; at strength 0 exactly ``weight``."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
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

    def fits(self, shape: torch.Size) -> bool:
        """Whether the delta has the shape of a weight (1x1 convolutions and linears are interchangeable)."""
        rows, columns = self.up.shape[0], self.down[0].numel()
        return self.up.flatten(1).shape[1] == self.rank and rows == shape[0] and rows * columns == shape.numel()

    def delta(self, shape: torch.Size) -> Tensor:
        """Return what is added at strength 1: float32, of the weight's shape."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(shape)

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return ``weight + strength * delta``, float32."""
        return weight.float() + strength * self.delta(weight.shape).to(weight.device)
