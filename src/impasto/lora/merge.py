"""What a stack of patches makes of one weight: float32 arithmetic on the model's own bits, rounded once.

Knows patches, strengths and one weight. Knows no files, networks or names.

The rule of stacks: patches take effect one after another in the request's order, each on the weight as the earlier
ones left it, all in float32. That is what merging the files into the checkpoint one after another means, less its
roundings. Kinds that add commute with each other, so neighbours that add are summed, and low-rank neighbours become
one matrix product. A kind that multiplies or interpolates (DoRA, OFT, IA3) placed first sees the model's own weight,
as in its training; placed later it sees what stands before it.

Rounding: float32 sums differ from the exact value by about 2^-22 of their terms; after that comes one rounding to the
weight's format. So the bits are those of "add up in float32, then round", or one unit in the last place beside them
where the sum falls next to the middle of two numbers. Where weight and delta nearly cancel, that 2^-22 of the terms
can be several units of the small number that is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from impasto.lora.cache import patch_bytes, patch_on
from impasto.lora.patch import LowRank, Patch

Stack = Sequence[tuple[Patch, float]]  # patches with their strengths, in the request's order
Part = tuple[Tensor, Tensor, float]  # ``up``, ``down``, and the factor of their product

BLOCK_NUMBERS = 1024 * 1024  # float32 numbers worked on at a time on a CPU: they stay in its cache
UP_EXPONENT = 15  # the largest number of ``up`` lies under 2 to this, near the top of float16
SUM_EXPONENT = 120  # sums before they are multiplied with ``alpha`` lie under 2 to this
MOST_SHIFT = 60  # a power of two that ``alpha`` has room for in float32
MARGIN = 4  # how far below the largest finite number a bound must stay for the sum not to be looked at
USUAL = 2.0**50  # factors between this and one part in it are multiplied as they are: no sum of theirs leaves float32


class Form(Protocol):
    """All that a plan depends on of a weight, such as a tensor: nothing of what it holds."""

    @property
    def ndim(self) -> int:
        """Axes."""

    @property
    def dtype(self) -> torch.dtype:
        """Format."""

    @property
    def device(self) -> torch.device:
        """Where it is."""


class Recipe(Protocol):
    """How to make the patched weight."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""

    @property
    def risky(self) -> bool:
        """Whether the result could be infinite or no number, so that it must be looked at."""

    @property
    def layout(self) -> int:
        """How many weights are made in one product: a GPU's library may add up in another order for another number."""

    @property
    def low_rank(self) -> Part | None:
        """``up``, ``down`` and the factor of their product, if that is all it adds."""

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Make ``weight``, in place, the patched ``pristine``: of one shape and dtype."""


def recipe(stack: Stack, weight: Tensor) -> Recipe:
    """Make a stack ready for a weight, on the weight's device."""
    return planned(stack, weight).on(weight.device)


def planned(stack: Stack, weight: Form) -> Plan:
    """Make a stack ready for a weight, where the patches' tensors are; no number of the weight is looked at."""
    steps = list(_steps(stack, weight))
    if len(steps) == 1 and isinstance(steps[0], Product):
        return steps[0]
    return InOrder(tuple(steps))


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """The patched weight itself, made before.

    Attributes:
        bits: Of the weight's shape and dtype.
        layout: Of the recipe that made them.
        low_rank: Of that recipe, where somebody needs it still.
    """

    bits: Tensor
    layout: int = 1
    low_rank: Part | None = None
    risky = False

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        factors = self.low_rank[:2] if self.low_rank else ()
        return self.bits.nbytes + sum(factor.nbytes for factor in factors)

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Copy."""
        weight.copy_(self.bits)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Low-rank patches that stand side by side: ``W' = W + alpha * up @ down``.

    Attributes:
        up: ``[out, r]``, the patches' ranks one after another, scales and strengths but for ``alpha`` inside.
        down: ``[r, in]``, kernels flattened. Both may be the file's own tensors.
        alpha: A factor of the whole.
        fused: Whether one product in the weight's format is exact.
        risky: Whether the sum could leave the weight's format.
    """

    up: Tensor
    down: Tensor
    alpha: float
    fused: bool
    risky: bool
    layout = 1

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return self.up.nbytes + self.down.nbytes

    @property
    def low_rank(self) -> Part:
        """Its factors."""
        return self.up, self.down, self.alpha

    def on(self, device: torch.device) -> Product:
        """Return it with its factors on a device; itself, if they are there."""
        if self.up.device == self.down.device == device:
            return self
        return replace(self, up=self.up.to(device), down=self.down.to(device))

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

    def on(self, device: torch.device) -> Whole:
        """Return it with the patch on a device."""
        return Whole(patch_on(self.patch, device), self.strength)

    def added(self, total: Tensor) -> Tensor:
        """Return the weight that the patch makes of ``total``."""
        return self.patch.patched(total, self.strength).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class InOrder:
    """Any stack: its steps one after another in float32."""

    steps: tuple[Product | Whole, ...]
    risky = True
    layout = 1
    low_rank = None

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(step.nbytes for step in self.steps)

    def on(self, device: torch.device) -> InOrder:
        """Return it with everything on a device."""
        return InOrder(tuple(step.on(device) for step in self.steps))

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Make the patched weight in a float32 copy."""
        total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(pristine)
        for step in self.steps:
            total = step.added(total)
        weight.copy_(total)


Plan = Product | InOrder  # a recipe that does not need the weight's device yet


def _steps(stack: Stack, weight: Form) -> Iterator[Product | Whole]:
    """Gather what adds into products as far as nothing that multiplies stands between."""
    waiting: list[Part] = []
    for patch, strength in stack:
        part = _part(patch, strength) if patch.additive and weight.ndim > 1 else None
        if part is not None:
            waiting.append(part)
            continue
        if not patch.additive and waiting:
            yield _product(waiting, weight)
            waiting = []
        yield Whole(patch, strength)
    if waiting:
        yield _product(waiting, weight)


def _part(patch: Patch, strength: float) -> Part | None:
    """Return ``up``, ``down`` and what their product is multiplied with; low-rank halves as the file has them."""
    if isinstance(patch, LowRank):
        return patch.up.flatten(1), patch.down.flatten(1), patch.scale * strength
    factors = patch.factors()
    return None if factors is None else (*factors, strength)


def _product(parts: Sequence[Part], weight: Form) -> Product:
    """Lay the ranks side by side, in the smallest formats that lose nothing.

    A bfloat16 file on a bfloat16 model can be multiplied as it is: its products are exact in float32 sums, at half the
    work. Others are multiplied in float32.
    """
    alpha = max((factor for _, _, factor in parts), key=abs)
    if all(factor == alpha for _, _, factor in parts) and _alike(parts):
        up, down = _joined([up for up, _, _ in parts], 1), _joined([down for _, down, _ in parts], 0)
        widest, longest = _largest(up), _largest(down)
        if all(_usual(size) for size in (alpha, widest, longest)):
            return _ready(up, down, alpha, abs(alpha) * up.shape[1] * widest * longest, weight)
    return _rescaled(parts, alpha if _usual(alpha) else 1.0, weight)


def _rescaled(parts: Sequence[Part], alpha: float, weight: Form) -> Product:
    """Make a product of parts with factors of their own, or of unusual sizes, by way of float32."""
    shares = [factor / alpha for _, _, factor in parts]
    up = torch.cat([up.float() * share for (up, _, _), share in zip(parts, shares, strict=True)], 1)
    down = torch.cat([down.float() for _, down, _ in parts])
    widest = _largest(up)
    largest = up.shape[1] * widest * _largest(down)
    if _in_range(abs(alpha) * largest, weight):
        # Times a power of two, so that small ones keep their digits in a small format, and no sum leaves float32.
        exponent = min(UP_EXPONENT - math.frexp(widest)[1], SUM_EXPONENT - math.frexp(largest)[1])
        shift = 2.0 ** max(-MOST_SHIFT, min(MOST_SHIFT, exponent))
        up, alpha, largest = up * shift, alpha / shift, largest * shift
    return _ready(up, down, alpha, abs(alpha) * largest, weight)


def _ready(up: Tensor, down: Tensor, alpha: float, bound: float, weight: Form) -> Product:
    """Choose the formats; no number of the sum is over ``bound``."""
    up, down = _small(up), _small(down)
    return Product(
        up=up,
        down=down,
        alpha=alpha,
        fused=_fused_is_exact(weight) and all(_same_in(weight.dtype, half) for half in (up, down)),
        risky=not _in_range(bound, weight),
    )


def _usual(size: float) -> bool:
    return 1 / USUAL < abs(size) < USUAL


def _in_range(bound: float, weight: Form) -> bool:
    return bound < torch.finfo(weight.dtype).max / MARGIN  # a NaN is not


def _fused_is_exact(weight: Form) -> bool:
    """Whether ``addmm`` in the weight's format adds up in float32 and rounds once.

    It does in float32 everywhere, and in bfloat16 on a CPU (the tests check it). A GPU's library may round partial
    sums, and the float32 way costs it little.
    """
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and weight.device.type == "cpu")


def _alike(parts: Sequence[Part]) -> bool:
    """Whether all are in one of the formats that are multiplied as they are."""
    formats = {half.dtype for up, down, _ in parts for half in (up, down)}
    return len(formats) == 1 and formats <= {torch.bfloat16, torch.float16, torch.float32}


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _largest(tensor: Tensor) -> float:
    least, most = torch.aminmax(tensor)
    return max(-least.item(), most.item())


def _small(tensor: Tensor) -> Tensor:
    return next((tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16) if _same_in(dtype, tensor)), tensor)


def _same_in(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether a format holds these numbers exactly; most that do not fit are told by their first row."""
    if dtype in (tensor.dtype, torch.float32):
        return True
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in (tensor[:1], tensor))
