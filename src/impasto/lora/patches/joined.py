"""Several kinds on one weight of one file, such as a low-rank pair and a whole difference.

Knows how they follow one another; no files or names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patch import Patch


@dataclass(frozen=True, slots=True, eq=False)
class Joined(Patch):
    """``W + sum of (W_i - W)``: each part changes the weight as it was before this file, so their order is free."""

    kind: ClassVar[str] = "joined"
    additive: ClassVar[bool] = False

    parts: tuple[Patch, ...]

    @property
    def rank(self) -> int | None:
        """Of the first part that has one."""
        return next((part.rank for part in self.parts if part.rank is not None), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first part."""
        return self.parts[0].shape

    def fits(self, shape: torch.Size) -> bool:
        """Whether every part fits."""
        return all(part.fits(shape) for part in self.parts)

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the weight with every part's change, float32."""
        base = weight.float()
        total = base.clone() if strength else base
        for part in self.parts if strength else ():
            total += part.patched(weight, strength) - base
        return total
