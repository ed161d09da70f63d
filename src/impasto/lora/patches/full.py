"""Whole parameters: differences of weights, biases and norms, and weights that replace the model's.

Knows tensors; no files or names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patch import Patch, interchangeable


@dataclass(frozen=True, slots=True, eq=False)
class Difference(Patch):
    """``W' = W + strength * diff``; LyCORIS' "full" kind."""

    kind: ClassVar[str] = "full"
    additive: ClassVar[bool] = True

    diff: Tensor

    @property
    def rank(self) -> None:
        """It has none."""
        return

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the difference."""
        return tuple(self.diff.shape)

    def fits(self, shape: torch.Size) -> bool:
        """Whether it has the shape of the parameter."""
        return tuple(shape) == self.shape or (len(self.shape) > 1 and interchangeable(self.shape, tuple(shape)))

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return ``weight + strength * diff``, float32."""
        if strength == 0:
            return weight.float()
        return weight.float() + strength * self.diff.float().reshape(weight.shape).to(weight.device)


@dataclass(frozen=True, slots=True, eq=False)
class BiasDifference(Difference):
    """``b' = b + strength * diff``."""

    kind: ClassVar[str] = "bias"


@dataclass(frozen=True, slots=True, eq=False)
class NormDifference(Difference):
    """``W' = W + strength * diff`` for the weight or the bias of a normalisation."""

    kind: ClassVar[str] = "norm"


@dataclass(frozen=True, slots=True, eq=False)
class Replacement(Patch):
    """``W' = W + strength * (replacement - W)``."""

    kind: ClassVar[str] = "replacement"
    additive: ClassVar[bool] = False

    replacement: Tensor

    @property
    def rank(self) -> None:
        """It has none."""
        return

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the replacement."""
        return tuple(self.replacement.shape)

    def fits(self, shape: torch.Size) -> bool:
        """Whether it has the shape of the parameter."""
        return tuple(shape) == self.shape or (len(self.shape) > 1 and interchangeable(self.shape, tuple(shape)))

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the weight moved towards the replacement, float32."""
        if strength == 0:
            return weight.float()
        return torch.lerp(weight.float(), self.replacement.float().reshape(weight.shape).to(weight.device), strength)
