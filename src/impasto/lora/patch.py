"""Patches: what a LoRA does to one weight, as a formula.

Knows tensors and the maths of each kind. Knows no files, names or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``W' = W + strength * scale * up @ down``.

    Attributes:
        down: ``[r, in]``, or ``[r, in, kh, kw]`` for a convolution.
        up: ``[out, r]``, or ``[out, r, 1, 1]``.
        scale: ``alpha / r``; 1 where the file has no alpha.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; convolutions as in LoCon.
    """

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
