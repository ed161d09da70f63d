"""LoHa and LoKr: deltas that are element-wise or Kronecker products of small matrices.

Knows tensors and formulas; no files or names.

Source: Yeh et al. 2023 (arXiv:2309.14859), sections 3.2 and 3.3; LoHa after FedPara (arXiv:2108.06098).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patch import Patch, interchangeable


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rebuild a convolution from its core ``[r, r, kh, kw]`` and two sides ``[r, out]``, ``[r, in]``; float32."""
    return torch.einsum("ij...,ip,jq->pq...", core.float(), left.float(), right.float())


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """One of LoHa's two matrices: ``left [out, r] @ right [r, in*]``, or Tucker's form with the sides ``[r, ·]``."""

    left: Tensor
    right: Tensor
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        if self.core is not None:
            return (self.left.shape[1], self.right.shape[1], *self.core.shape[2:])
        return (self.left.shape[0], *self.right.shape[1:])

    def whole(self) -> Tensor:
        """Return the matrix, or the convolution, in float32."""
        if self.core is not None:
            return tucker(self.core, self.left, self.right)
        return self.left.float() @ self.right.float().flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard(Patch):
    """``W' = W + strength * scale * (first ∘ second)``, ∘ being the element-wise product.

    ``scale`` is ``alpha / r`` and counts once, as in training (LyCORIS' own merge counts it twice).
    """

    kind: ClassVar[str] = "LoHa"
    additive: ClassVar[bool] = True

    first: Half
    second: Half
    scale: float

    @property
    def rank(self) -> int:
        """Inner dimension of each half."""
        return self.first.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the delta."""
        return self.first.shape

    def fits(self, shape: torch.Size) -> bool:
        """Whether the delta has the shape of a weight."""
        return interchangeable(self.shape, tuple(shape))

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return ``weight + strength * delta``, float32."""
        if strength == 0:
            return weight.float()
        delta = self.first.whole() * self.second.whole() * self.scale
        return weight.float() + strength * delta.reshape(weight.shape).to(weight.device)


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(Patch):
    """``W' = W + strength * scale * (small ⊗ large)``.

    Attributes:
        small: ``[a, b]``.
        large: ``[c, d]`` or ``[c, d, kh, kw]``; for a convolution also ``[c, d * kh * kw]``.
        scale: ``alpha / r``, once; 1 where neither factor is low-rank, whatever alpha says.
        rank: Of the factor that is low-rank, if one is.
    """

    kind: ClassVar[str] = "LoKr"
    additive: ClassVar[bool] = True

    small: Tensor
    large: Tensor
    scale: float
    rank: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the delta: ``[a * c, b * d, ...]``."""
        (a, b), (c, d, *window) = self.small.shape, self.large.shape
        return (a * c, b * d, *window)

    def fits(self, shape: torch.Size) -> bool:
        """Whether the delta has the shape of a weight."""
        return interchangeable(self.shape, tuple(shape))

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return ``weight + strength * delta``, float32."""
        if strength == 0:
            return weight.float()
        delta = torch.einsum("ab,cd...->acbd...", self.small.float(), self.large.float()) * self.scale
        return weight.float() + strength * delta.reshape(weight.shape).to(weight.device)
