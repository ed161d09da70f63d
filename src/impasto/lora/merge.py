"""What a stack of patches makes of one weight: float32 arithmetic on the model's own bits, rounded once.

Knows patches, strengths and one weight. Knows no files, networks or names.

The rule of stacks: patches take effect one after another in the request's order, each on the weight as the earlier
ones left it, all in float32. That is what merging the files into the checkpoint one after another means, less its
roundings. Kinds that add commute with each other, so neighbours that add are summed, and low-rank neighbours become
one matrix product. A kind that multiplies or interpolates (DoRA, OFT, IA3) placed first sees the model's own weight,
as in its training; placed later it sees what stands before it.

Rounding: float32 sums differ from the exact value by about 2^-22 of their terms; after that comes one rounding to the
weight's format. So the bits are those of "add up in float32, then round", or one unit in the last place beside them
where the sum falls next to the middle of two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from impasto.lora.cache import patch_bytes, patch_on
from impasto.lora.patch import Patch

Stack = Sequence[tuple[Patch, float]]  # patches with their strengths, in the request's order

BLOCK_NUMBERS = 256 * 1024  # float32 numbers worked on at a time on a CPU: they stay in its cache
UP_EXPONENT = 15  # the largest number of ``up`` lies under 2 to this, near the top of float16
MOST_SHIFT = 100  # a power of two that float32 holds with room to spare
MARGIN = 4  # how far below the largest finite number a bound must stay for the sum not to be looked at


class Recipe(Protocol):
    """How to make the patched weight."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""

    @property
    def risky(self) -> bool:
        """Whether the result could be infinite or no number, so that it must be looked at."""

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Make ``weight``, in place, the patched ``pristine``: of one shape and dtype."""


def recipe(stack: Stack, weight: Tensor) -> Recipe:
    """Make a stack ready for a weight, on the weight's device."""
    steps = list(_steps(stack, weight))
    if len(steps) == 1 and isinstance(steps[0], Product):
        return steps[0]
    return InOrder(tuple(steps))


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """The patched weight itself, made before.

    Attributes:
        bits: Of the weight's shape and dtype.
    """

    bits: Tensor
    risky = False

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return self.bits.nbytes

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Copy."""
        weight.copy_(self.bits)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Low-rank patches that stand side by side: ``W' = W + alpha * up @ down``.

    Attributes:
        up: ``[out, r]``, the patches' ranks one after another, strengths but for ``alpha`` inside.
        down: ``[r, in]``, kernels flattened.
        alpha: A factor of the whole.
        fused: Whether one product in the weight's format is exact.
        risky: Whether the sum could leave the weight's format.
    """

    up: Tensor
    down: Tensor
    alpha: float
    fused: bool
    risky: bool

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return self.up.nbytes + self.down.nbytes

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Make the patched weight in one pass over it."""
        own, dtype = pristine.to(weight.device), weight.dtype
        if self.fused and not weight.is_inference() and weight.is_contiguous() and own.is_contiguous():
            matrix = weight.view(len(weight), -1)
            torch.addmm(own.flatten(1), self.up.to(dtype), self.down.to(dtype), alpha=self.alpha, out=matrix)
            return
        up, down = self.up.float(), self.down.float()
        rows = max(1, BLOCK_NUMBERS // down.shape[1]) if weight.device.type == "cpu" else len(weight)
        scratch = torch.empty((min(rows, len(weight)), *weight.shape[1:]), dtype=torch.float32, device=weight.device)
        for start in range(0, len(weight), rows):
            block = scratch[: min(rows, len(weight) - start)].copy_(own[start : start + rows])
            block.flatten(1).addmm_(up[start : start + rows], down, alpha=self.alpha)
            weight[start : start + rows].copy_(block)

    def added(self, total: Tensor) -> Tensor:
        """Return ``total``, float32 and contiguous, with the product added to it in place."""
        total.view(len(total), -1).addmm_(self.up.float(), self.down.float(), alpha=self.alpha)
        return total


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """One patch by its own formula."""

    patch: Patch
    strength: float

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return patch_bytes(self.patch)

    def added(self, total: Tensor) -> Tensor:
        """Return the weight that the patch makes of ``total``."""
        return self.patch.patched(total, self.strength).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class InOrder:
    """Any stack: its steps one after another in float32."""

    steps: tuple[Product | Whole, ...]
    risky = True

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(step.nbytes for step in self.steps)

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Make the patched weight in a float32 copy."""
        total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(pristine)
        for step in self.steps:
            total = step.added(total)
        weight.copy_(total)


def _steps(stack: Stack, weight: Tensor) -> Iterator[Product | Whole]:
    """Gather what adds into products as far as nothing that multiplies stands between."""
    waiting: list[tuple[Tensor, Tensor, float]] = []
    for patch, strength in stack:
        factors = patch.factors() if patch.additive and weight.ndim > 1 else None
        if factors is not None:
            waiting.append((*factors, strength))
            continue
        if not patch.additive and waiting:
            yield _product(waiting, weight)
            waiting = []
        yield Whole(patch_on(patch, weight.device), strength)
    if waiting:
        yield _product(waiting, weight)


def _product(parts: Sequence[tuple[Tensor, Tensor, float]], weight: Tensor) -> Product:
    """Lay the ranks side by side, in the smallest formats that lose nothing.

    A bfloat16 file on a bfloat16 model can be multiplied as it is: its products are exact in float32 sums, at half the
    work. Others are multiplied in float32.
    """
    alpha = max((strength for _, _, strength in parts), key=abs)
    up = torch.cat([up.float() * (strength / alpha) for up, _, strength in parts], 1)
    down = torch.cat([down.float() for _, down, _ in parts])
    widest = up.abs().amax().item()
    largest = abs(alpha) * up.shape[1] * widest * down.abs().amax().item()
    risky = not largest < torch.finfo(weight.dtype).max / MARGIN  # a NaN is risky too
    if not risky and widest > 0:  # alpha / r inside may have made some too small for the file's format: a power of two
        shift = min(MOST_SHIFT, UP_EXPONENT - math.frexp(widest)[1])
        up, alpha = up * 2.0**shift, alpha * 2.0**-shift
    return Product(
        up=_small(up).to(weight.device),
        down=_small(down).to(weight.device),
        alpha=alpha,
        fused=_fused_is_exact(weight) and _same_in(weight.dtype, up) and _same_in(weight.dtype, down),
        risky=risky,
    )


def _fused_is_exact(weight: Tensor) -> bool:
    """Whether ``addmm`` in the weight's format adds up in float32 and rounds once.

    It does in float32 everywhere, and in bfloat16 on a CPU (the tests check it). A GPU's library may round partial
    sums, and the float32 way costs it little.
    """
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and weight.device.type == "cpu")


def _small(tensor: Tensor) -> Tensor:
    return next((tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16) if _same_in(dtype, tensor)), tensor)


def _same_in(dtype: torch.dtype, tensor: Tensor) -> bool:
    return torch.equal(tensor.to(dtype).float(), tensor)
