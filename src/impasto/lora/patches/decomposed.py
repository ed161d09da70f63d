"""DoRA: the direction of a patched weight, with a trained length.

Knows tensors and the formula; no files or names.

Source: Liu et al. 2024 (arXiv:2402.09353), equation 5. Trainers differ in the axis (paper: each input's column), never
in the norm: it is that of the weight with the delta on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from impasto.lora.patch import Patch


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed(Patch):
    """``W' = magnitude * V / norm(V)``, ``V = W + delta``; at strength ``s`` it is ``W + s * (W' - W)``.

    The delta's own strength is always 1, so that half the strength is half the way.

    Attributes:
        inner: The additive patch that gives the delta.
        magnitude: ``[out]`` or ``[in]``.
        axis: Which of the two: one norm for each output (0) or for each input (1).
    """

    kind: ClassVar[str] = "DoRA"
    additive: ClassVar[bool] = False

    inner: Patch
    magnitude: Tensor
    axis: Literal[0, 1]

    @property
    def rank(self) -> int | None:
        """Of the delta."""
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the delta."""
        return self.inner.shape

    def fits(self, shape: torch.Size) -> bool:
        """Whether both the delta and the magnitude are for a weight of this shape."""
        return self.inner.fits(shape) and self.magnitude.numel() == shape[self.axis]

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the weight moved towards the decomposed one, float32."""
        if strength == 0:
            return weight.float()
        moved = self.inner.patched(weight, 1.0)
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        magnitude = self.magnitude.float().to(weight.device).reshape(norm.shape)
        # A norm of zero has no direction: such a row stays zero.
        whole = moved * (magnitude / torch.where(norm == 0, 1.0, norm))
        return torch.lerp(weight.float(), whole, strength)
