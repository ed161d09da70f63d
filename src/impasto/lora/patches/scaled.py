"""IA3: every output, or every input, of a layer scaled by a trained number.

Knows tensors and the formula; no files or names.

Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3; the scale written as a difference from 1, as LyCORIS does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patch import Patch


@dataclass(frozen=True, slots=True, eq=False)
class Scaled(Patch):
    """``W' = W * (1 + strength * change)``, along the outputs or the inputs.

    Attributes:
        change: ``[out]`` or ``[in]``.
        on_input: Which of the two.
    """

    kind: ClassVar[str] = "IA3"
    additive: ClassVar[bool] = False

    change: Tensor
    on_input: bool

    @property
    def rank(self) -> None:
        """It has none."""
        return

    @property
    def shape(self) -> tuple[int, ...]:
        """The one axis that it has."""
        return (self.change.numel(),)

    def fits(self, shape: torch.Size) -> bool:
        """Whether it has a number for each output, or input."""
        return len(shape) > 1 and self.change.numel() == shape[int(self.on_input)]

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the scaled weight, float32."""
        if strength == 0:
            return weight.float()
        sides = [1] * weight.ndim
        sides[int(self.on_input)] = -1
        return weight.float() * (1 + strength * self.change.float().to(weight.device).reshape(sides))


@dataclass(frozen=True, slots=True, eq=False)
class ScaledBias(Scaled):
    """``b' = b * (1 + strength * change)``: PEFT scales a layer's answers, and the bias is a part of them."""

    def fits(self, shape: torch.Size) -> bool:
        """Whether it has a number for each output."""
        return tuple(shape) == self.shape
