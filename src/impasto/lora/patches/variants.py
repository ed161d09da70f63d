"""Low-rank sums that trainers write in other parts: VeRA, whose modules share their matrices, and AdaLoRA.

Knows tensors and the formulas; no files or names.

Source: VeRA: Kopiczko et al. 2024 (arXiv:2310.11454), equation 2; AdaLoRA: Zhang et al. 2023 (arXiv:2303.10512),
equation 3; shapes and scales as in PEFT's ``tuners/vera`` and ``tuners/adalora``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patch import Factors, LowRank, Patch, interchangeable

_PER_RANK = 1e-5  # what PEFT adds to AdaLoRA's rank before it divides by it


@dataclass(frozen=True, slots=True, eq=False)
class Vera(Patch):
    """``W' = W + strength * (by_output * up) @ (by_rank * down)``, worked out when it is asked for.

    Attributes:
        down: ``[r, in]``, a view of the matrix that all modules share, so that a file of many modules stays small.
        up: ``[out, r]``, a view too.
        by_rank: ``[r]``, the module's own.
        by_output: ``[out]``, the module's own.
    """

    kind: ClassVar[str] = "VeRA"
    additive: ClassVar[bool] = True

    down: Tensor
    up: Tensor
    by_rank: Tensor
    by_output: Tensor

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        return (self.up.shape[0], self.down.shape[1])

    def fits(self, shape: torch.Size) -> bool:
        """Whether the delta has the shape of a weight."""
        return interchangeable(self.shape, tuple(shape))

    def factors(self) -> Factors:
        """Return both halves with the module's vectors in them."""
        up, down = self.up.float(), self.down.float()
        return up * self.by_output.float().reshape(-1, 1), down * self.by_rank.float().reshape(-1, 1)

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return ``weight + strength * delta``, float32."""
        if strength == 0:
            return weight.float()
        up, down = self.factors()
        return weight.float() + strength * (up @ down).reshape(weight.shape).to(weight.device)


@dataclass(frozen=True, slots=True, eq=False)
class AdaLora(LowRank):
    """``W' = W + strength * alpha / (r + 1e-5) * B @ (E * A)``; ``E`` has a singular value for each of the r rows."""

    kind: ClassVar[str] = "AdaLoRA"


def adalora(down: Tensor, up: Tensor, values: Tensor, scale: float) -> AdaLora:
    """Take the singular values ``[r, 1]`` into ``down [r, in]``; ``scale`` is alpha over the rank."""
    rank = down.shape[0]
    return AdaLora(down.float() * values.float().reshape(-1, 1), up, scale * rank / (rank + _PER_RANK))
