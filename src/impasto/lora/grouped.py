"""Weights of one shape, patched together: one batched product and a few copies where it was five launches for each.

Knows recipes, and which of them can be worked out side by side. Knows no files, and none of the state of weights.

The physics, on a GPU: SDXL's 722 attention linears are 4.4 GB in bfloat16, which takes a few milliseconds to read and
write; four or five launches for each take tens. So the factors of weights that are alike are kept stacked on the
device, ``[n, out, r]`` and ``[n, r, in]``, and a group of weights is written in three operations: their own values
into one float32 block, the product added to it, the block rounded into the weights. The block bounds the memory. What
is not one low-rank product (DoRA, LoKr, stacks with such) or stands alone is written by itself, as ``merge`` does it.

The sums are ``merge``'s: float32, rounded once. On a CPU all is written one by one, in blocks that stay in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from impasto.lora.keys import Target
from impasto.lora.merge import Image, Part, Plan, Product, Recipe

PIECES = {torch.bfloat16: 3, torch.float16: 2}  # of a format that make up 24, and 22, bits of a float32 number

Item = TypeVar("Item")


class Batch(Protocol):
    """Weights that are written in one go."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """Their names."""

    def write(self, weights: Sequence[Tensor], pristine: Sequence[Tensor]) -> Tensor | None:
        """Make the weights, in place, the patched ``pristine``, in the order of ``targets``.

        Returns whether all is finite, one truth value that nobody has waited for; ``None`` where there is no doubt.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Alone:
    """A weight by itself."""

    target: Target
    recipe: Recipe

    @property
    def targets(self) -> tuple[Target, ...]:
        """Its name."""
        return (self.target,)

    def write(self, weights: Sequence[Tensor], pristine: Sequence[Tensor]) -> Tensor | None:
        """Write it as its recipe does."""
        self.recipe.write(weights[0], pristine[0])
        return torch.isfinite(weights[0]).all() if self.recipe.risky else None


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Weights that were made before."""

    targets: tuple[Target, ...]
    bits: tuple[Tensor, ...]

    def write(self, weights: Sequence[Tensor], pristine: Sequence[Tensor]) -> None:
        """Copy them all."""
        torch._foreach_copy_(list(weights), list(self.bits))


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Low-rank products of weights of one shape and dtype.

    Attributes:
        targets: The weights' names.
        up: ``[n, out, r]``, one for each weight; or ``[n, out, k r]``, which are the sum of ``k`` such ``in_pieces``.
        down: ``[n, r, in]``, on the same device.
        alpha: A factor of all products.
        risky: Whether a sum could leave the weights' format.
    """

    targets: tuple[Target, ...]
    up: Tensor
    down: Tensor
    alpha: float
    risky: bool

    def write(self, weights: Sequence[Tensor], pristine: Sequence[Tensor]) -> Tensor | None:
        """Add up all in one float32 block and round it into the weights."""
        like = weights[0]
        total = torch.empty((len(weights), *like.shape), dtype=torch.float32, device=like.device)
        # Only towards a GPU may a copy be left running: its memory comes back in the order of the GPU's work.
        torch._foreach_copy_(total.unbind(), list(pristine), non_blocking=like.device.type == "cuda")
        pieces = self.up.shape[2] // self.down.shape[1]
        add_products(total.flatten(2), self.up, self.down.repeat(1, pieces, 1) if pieces > 1 else self.down, self.alpha)
        finite = _rounds_to_finite(total, like.dtype) if self.risky else None
        torch._foreach_copy_(list(weights), total.unbind())
        return finite


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One weight's place in a group: a recipe that is written with all the others."""

    group: Group
    place: int

    @property
    def nbytes(self) -> int:
        """Bytes of its part of the group's factors."""
        return self.group.up[self.place].nbytes + self.group.down[self.place].nbytes

    @property
    def risky(self) -> bool:
        """Whether the group has to be looked at."""
        return self.group.risky

    @property
    def layout(self) -> int:
        """How many are in the group."""
        return len(self.group.targets)

    @property
    def low_rank(self) -> Part:
        """Its factors."""
        up, down = self.group.up[self.place], self.group.down[self.place]
        if up.shape[1] > down.shape[0]:
            up = up.float().reshape(len(up), -1, down.shape[0]).sum(1)
        return up, down, self.group.alpha

    def write(self, weight: Tensor, pristine: Tensor) -> None:
        """Write this one without the others."""
        group, one = self.group, slice(self.place, self.place + 1)
        Group((), group.up[one], group.down[one], group.alpha, risky=False).write([weight], [pristine])


def placed(
    plans: Iterable[tuple[Target, Plan]],
    weight: Callable[[Target], Tensor],
    most: int,
    devices: Container[str],
) -> dict[Target, Recipe]:
    """Make planned stacks ready for their weights, on the weights' devices, with what is alike in groups.

    Args:
        plans: What each weight gets.
        weight: Gives a weight by its name.
        most: Bytes of float32 numbers that a group may be; 0: no groups.
        devices: Types of devices where there are to be groups.
    """
    made: dict[Target, Recipe] = {}
    owned = ((target, plan, weight(target)) for target, plan in plans)
    described = (((target, plan), _kind(plan, own, devices), _scratch(own)) for target, plan, own in owned)
    for alike in divided(described, most):
        device = weight(alike[0][0]).device
        products = {target: plan for target, plan in alike if isinstance(plan, Product)}
        if len(products) > 1:
            group = _group(products, device)
            made |= {target: Member(group, place) for place, target in enumerate(group.targets)}
        else:
            made |= {target: plan.on(device) for target, plan in alike}
    return made


def divided(items: Iterable[tuple[Item, Hashable | None, int]], most: int) -> Iterator[list[Item]]:
    """Divide things into groups of one kind each, of at most ``most`` bytes.

    A group is handed out as soon as it is full, so that few wait; a thing larger than ``most`` or of no kind is a
    group of its own. Kinds keep the order of their things.

    Args:
        items: Each thing with its kind, ``None`` for one to stay alone, and its bytes.
        most: Bytes of a group.
    """
    waiting: dict[Hashable, tuple[list[Item], int]] = {}
    for item, kind, size in items:
        if kind is None or size > most:
            yield [item]
            continue
        group, held = waiting.pop(kind, ([], 0))
        if held + size > most and group:
            yield group
            group, held = [], 0
        waiting[kind] = ([*group, item], held + size)
    for group, _ in waiting.values():
        yield group


def batches(todo: Mapping[Target, Recipe]) -> Iterator[Batch]:
    """Gather what can be written in one go; a group whole, though ``todo`` may have only some of it.

    The bits of a group's weights then do not depend on what was on before.
    """
    images: dict[Hashable, list[tuple[Target, Tensor]]] = {}
    begun: set[int] = set()
    for target, recipe in todo.items():
        if isinstance(recipe, Member):
            if id(recipe.group) not in begun:
                begun.add(id(recipe.group))
                yield recipe.group
        elif isinstance(recipe, Image):
            images.setdefault((recipe.bits.device, recipe.bits.dtype), []).append((target, recipe.bits))
        else:
            yield Alone(target, recipe)
    for alike in images.values():
        targets, bits = zip(*alike, strict=True)
        yield Images(targets, bits)


def add_products(total: Tensor, up: Tensor, down: Tensor, alpha: float) -> None:
    """Add ``alpha * up @ down`` to ``total``, in place: ``[n, out, r]`` and ``[n, r, in]`` to float32 ``[n, out, in]``.

    Halves of one 16-bit format are multiplied as they are where the device can add up and answer in float32: their
    products are exact in it, and a GPU is many times as fast with them.
    """
    if up.dtype == down.dtype and _answers_in_float32(total.device, up.dtype):
        torch.baddbmm(total, up, down, torch.float32, alpha=alpha, out=total)
    else:
        total.baddbmm_(up.float(), down.float(), alpha=alpha)


def in_pieces(up: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 numbers ``[..., r]`` as sums of 16-bit ones ``[..., k r]``, each piece what the earlier ones left.

    Exact in bfloat16, which takes three; two of float16 are within 2^-22 of the number, or 2^-25 of 1. So float32
    factors too, as LoRAs of different strengths have, are multiplied by what a GPU is fast with: three times the
    operations at many times the rate.
    """
    pieces: list[Tensor] = []
    for _ in range(PIECES[dtype]):
        pieces.append(up.to(dtype))
        up = up - pieces[-1].float()
    return torch.cat(pieces, -1)


@cache
def _answers_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of this 16-bit format can be had in float32, tried on a trifle that the format cannot hold."""
    if device.type != "cuda" or dtype not in PIECES:
        return False
    total = torch.ones(2, 16, 16, device=device)
    up, down = (torch.full((2, 16, 16), 1 + 2**-6, dtype=dtype, device=device) for _ in range(2))
    try:
        torch.baddbmm(total, up, down, torch.float32, alpha=0.5, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((total == 1 + 0.5 * 16 * (1 + 2**-6) ** 2).all())


def _rounds_to_finite(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether all numbers are finite once they are rounded to a format: the least and the largest are, and no NaN."""
    return torch.stack(torch.aminmax(total)).to(dtype).isfinite().all()


def _kind(plan: Recipe, weight: Tensor, devices: Container[str]) -> Hashable | None:
    """What weights of one group have alike; ``None`` for one that is written alone."""
    if not isinstance(plan, Product) or weight.device.type not in devices or not weight.is_contiguous():
        return None
    formats = (weight.dtype, plan.up.dtype, plan.down.dtype)
    return (weight.shape, weight.device, formats, plan.up.shape[1], plan.alpha, plan.risky)


def _scratch(weight: Tensor) -> int:
    return weight.numel() * torch.float32.itemsize


def _group(products: Mapping[Target, Product], device: torch.device) -> Group:
    one = next(iter(products.values()))
    up = _stacked([product.up for product in products.values()], device)
    down = _stacked([product.down for product in products.values()], device)
    if up.dtype == torch.float32 and not one.risky and _answers_in_float32(device, down.dtype):
        up = in_pieces(up, down.dtype)  # which fit: what is not risky was scaled to under 2^UP_EXPONENT
    return Group(tuple(products), up, down, one.alpha, one.risky)


def _stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack on a device: for a GPU in memory that it can read by itself, in one transfer that nobody waits for."""
    if device.type != "cuda" or tensors[0].is_cuda:
        return torch.stack(list(tensors)).to(device)
    shape = (len(tensors), *tensors[0].shape)
    staged = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True)
    return torch.stack(list(tensors), out=staged).to(device, non_blocking=True)
