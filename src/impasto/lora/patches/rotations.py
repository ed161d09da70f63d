"""Orthogonal fine-tuning: weights turned by small rotations, of the outputs (diag-OFT, BOFT) or the inputs (OFTv2).

Knows tensors and formulas; no files or names. A rotation is kept as its difference from the identity, worked out once
in float64, so that a small turn loses no digits.

Source: Qiu et al. 2023 (arXiv:2306.07280); BOFT: Liu et al. 2023 (arXiv:2311.06243); OFTv2: Qiu et al. 2025
(arXiv:2506.19847). The constraint is that of COFT as kohya and LyCORIS train it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patch import Patch

_TINY = 1e-8  # what LyCORIS adds to the norm that it compares with the constraint


def cayley(blocks: Tensor, constraint: float = 0.0) -> Tensor:
    """Return ``R - I`` for ``R = (I + Q)(I - Q)^-1``, ``Q = blocks - blocks^T``; float32.

    Args:
        blocks: ``[..., b, b]``.
        constraint: Largest Frobenius norm of all ``Q`` together; zero or less is none.
    """
    skew = blocks.double() - blocks.double().mT
    norm = torch.linalg.vector_norm(skew) + _TINY
    if 0 < constraint < norm:
        skew = skew * (constraint / norm)
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    # R - I = 2 Q (I - Q)^-1
    turn: Tensor = torch.linalg.solve(identity - skew, 2 * skew, left=False)
    return turn.float()


def cayley_of_upper(upper: Tensor, terms: int | None, largest: float | None = None) -> Tensor:
    """Return ``R - I`` of OFTv2's rotations; float32.

    Args:
        upper: ``[n, b * (b - 1) / 2]``, the triangles above the diagonals of ``Q``.
        terms: How many terms of the Neumann series stand for the inverse; the last counts once, those between twice:
            5 is ``I + 2Q + 2Q² + 2Q³ + Q⁴``, and 3 counts as 4, as in PEFT. ``None`` is the exact
            ``(I - Q)(I + Q)^-1``.
        largest: Of ``Q``, all blocks together, for COFT; ``None``: any.
    """
    upper = upper.double() if largest is None else _within(upper.double(), largest)
    size = block_size(upper.shape[1])
    skew = torch.zeros(len(upper), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = upper
    skew = skew - skew.mT
    identity = torch.eye(size, dtype=torch.float64)
    if terms is None:
        exact: Tensor = torch.linalg.solve(identity + skew, -2 * skew, left=False)
        return exact.float()
    turn, power = torch.zeros_like(skew), identity.expand_as(skew)
    last = 3 if terms == 3 else terms - 1
    for exponent in range(1, last + 1):
        power = power @ skew
        turn += power if exponent == last and last > 1 else 2 * power
    return turn.float()


def _within(upper: Tensor, largest: float) -> Tensor:
    """Shrink what turns too far, as PEFT does before every use: each of ``n`` blocks has ``largest / sqrt(n)``."""
    norm = torch.linalg.vector_norm(upper, dim=1, keepdim=True) * 2**0.5  # each number stands twice in its block
    return upper * torch.clamp(largest / len(upper) ** 0.5 / torch.where(norm == 0, 1.0, norm), max=1.0)


def block_size(above: int) -> int:
    """Return the side of a square with that many numbers above its diagonal; 0 if there is none."""
    size = 1 + int((2 * above) ** 0.5)
    return size if above and size * (size - 1) == 2 * above else 0


@dataclass(frozen=True, slots=True, eq=False)
class Rotation(Patch):
    """What turns of every kind have in common: small square blocks along one axis of the weight.

    Attributes:
        turn: ``R - I``, ``[..., n, b, b]``.
    """

    additive: ClassVar[bool] = False

    turn: Tensor

    @property
    def rank(self) -> None:
        """It has none."""
        return

    @property
    def shape(self) -> tuple[int, ...]:
        """The axis that the blocks cover, which is all it knows."""
        return (self.turn.shape[-3] * self.turn.shape[-1],)


@dataclass(frozen=True, slots=True, eq=False)
class OutputRotated(Rotation):
    """``W' = rescale * R^T W``, ``R`` block-diagonal over the outputs; at strength ``s`` it is ``W + s * (W' - W)``.

    Attributes:
        turn: ``R - I``, ``[n, b, b]`` with ``n * b = out``.
        rescale: ``[out]``, if trained.
    """

    kind: ClassVar[str] = "diag-OFT"

    rescale: Tensor | None = None

    def fits(self, shape: torch.Size) -> bool:
        """Whether the blocks cover the outputs."""
        return len(shape) > 1 and self.shape[0] == shape[0] and covers(self.rescale, shape[0])

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the turned weight, float32."""
        if strength == 0:
            return weight.float()
        base, turn = weight.float(), self.turn.to(weight.device)
        rows = base.reshape(*turn.shape[:2], -1)
        change = torch.einsum("nij,nik->njk", turn, rows).reshape(base.shape)
        if self.rescale is not None:
            rescale = column(self.rescale, base)
            change = rescale * change + (rescale - 1) * base
        return base + strength * change


@dataclass(frozen=True, slots=True, eq=False)
class Butterfly(Rotation):
    """``W' = rescale * B_m … B_1 W``, stage ``i`` turning pairs of half-blocks that lie ``2^i`` half-blocks apart.

    At strength ``s`` every factor goes that part of its way: each rotation is ``I + s * (R - I)``, as LyCORIS trains
    and applies it, and the rescale ``1 + s * (rescale - 1)``.

    Attributes:
        turn: ``R - I``, ``[m, n, b, b]`` with ``n * b = out``.
        rescale: ``[out]``, if trained.
    """

    kind: ClassVar[str] = "BOFT"

    rescale: Tensor | None = None

    def fits(self, shape: torch.Size) -> bool:
        """Whether the blocks cover the outputs, and the widest stage divides them."""
        stages, _, _, size = self.turn.shape
        if len(shape) < 2 or size % 2 or self.shape[0] != shape[0] or stages > shape[0].bit_length():
            return False
        return shape[0] % (size * 2 ** (stages - 1)) == 0 and covers(self.rescale, shape[0])

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the turned weight, float32."""
        if strength == 0:
            return weight.float()
        turned, turn = weight.float().flatten(1), self.turn.to(weight.device) * strength
        size = turn.shape[-1]
        for stage, blocks in enumerate(turn):
            apart = 2**stage * (size // 2)
            # Rows that meet in this stage stand together, are turned, and go back to their places.
            rows = turned.reshape(-1, 2, apart, turned.shape[1]).transpose(1, 2).reshape(-1, size, turned.shape[1])
            rows = rows + blocks @ rows
            turned = rows.reshape(-1, apart, 2, turned.shape[1]).transpose(1, 2).reshape(turned.shape)
        turned = turned.reshape(weight.shape)
        if self.rescale is not None:
            turned = turned * (1 + strength * (column(self.rescale, turned) - 1))
        return turned


@dataclass(frozen=True, slots=True, eq=False)
class InputRotated(Rotation):
    """``W' = W R^T``, ``R`` block-diagonal over the inputs (with a convolution's window); linear in the strength.

    Attributes:
        turn: ``R - I``, ``[n, b, b]`` with ``n * b = in``; ``n`` is 1 where all blocks share one rotation.
    """

    kind: ClassVar[str] = "OFTv2"

    def fits(self, shape: torch.Size) -> bool:
        """Whether the blocks cover the inputs."""
        inputs = torch.Size(shape[1:]).numel()
        blocks, size = self.turn.shape[0], self.turn.shape[-1]
        return len(shape) > 1 and inputs % size == 0 and blocks in (1, inputs // size)

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the turned weight, float32."""
        if strength == 0:
            return weight.float()
        base = weight.float()
        rows = base.reshape(base.shape[0], -1, self.turn.shape[-1])
        turn = self.turn.to(weight.device).expand(rows.shape[1], -1, -1)
        return base + strength * torch.einsum("onk,nck->onc", rows, turn).reshape(base.shape)


def covers(rescale: Tensor | None, outputs: int) -> bool:
    """Whether a rescale, if there is one, has a number for each output."""
    return rescale is None or rescale.numel() == outputs


def column(rescale: Tensor, weight: Tensor) -> Tensor:
    """Return the rescale as a factor of each of the weight's outputs."""
    return rescale.float().to(weight.device).reshape(-1, *[1] * (weight.ndim - 1))
