"""GLoRA: a low-rank change of the weight itself and one beside it.

Knows tensors and the formula; no files or names.

Source: Chavan et al. 2023 (arXiv:2306.07967), equation 10, with the two terms that LyCORIS trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patch import Patch, interchangeable


@dataclass(frozen=True, slots=True, eq=False)
class Generalized(Patch):
    """``W' = W + strength * scale * (W @ before @ after + up @ down)``; for a convolution ``W @`` runs over its inputs.

    It reads the weight, so in a stack it counts where it stands.

    Attributes:
        before: ``[in, r]``.
        after: ``[r, in]``.
        up: ``[out, r]``.
        down: ``[r, in]`` or ``[r, in, kh, kw]``.
        scale: ``alpha / r``.
    """

    kind: ClassVar[str] = "GLoRA"
    additive: ClassVar[bool] = False

    before: Tensor
    after: Tensor
    up: Tensor
    down: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner dimension of both products."""
        return self.after.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the delta."""
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, shape: torch.Size) -> bool:
        """Whether both terms are for a weight of this shape."""
        return interchangeable(self.shape, tuple(shape)) and self.before.shape[0] == shape[1]

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the changed weight, float32."""
        if strength == 0:
            return weight.float()
        base, device = weight.float(), weight.device
        before, after, up = (part.float().to(device).flatten(1) for part in (self.before, self.after, self.up))
        beside = (up @ self.down.float().to(device).flatten(1)).reshape(base.shape)
        itself = torch.einsum("oi...,ir,rj->oj...", base, before, after)
        return base + (strength * self.scale) * (itself + beside)
