"""PEFT's BOFT: a weight's inputs turned by stages of small rotations, and its outputs scaled.

Knows tensors and formulas; no files or names. LyCORIS' BOFT, which turns the outputs, is in ``rotations``.

Source: Liu et al. 2023 (arXiv:2311.06243); the order of the inputs in each stage, the half in ``Q`` and the place of
the scale as in PEFT's ``tuners/boft/layer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from impasto.lora.patches.rotations import Rotation, column, covers


def half_cayley(blocks: Tensor) -> Tensor:
    """Return ``R - I`` for ``R = (I - Q)(I + Q)^-1``, ``Q = (blocks - blocks^T) / 2``; ``[..., b, b]``, float32."""
    skew = (blocks.double() - blocks.double().mT) / 2
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    turn: Tensor = torch.linalg.solve(identity + skew, -2 * skew, left=False)
    return turn.float()


@dataclass(frozen=True, slots=True, eq=False)
class InputButterfly(Rotation):
    """``W' = rescale * W (B_m … B_1)^T``; at strength ``s`` it is ``W + s * (W' - W)``.

    ``B_i = P_i R_i P_i^T``: stage ``i`` (from 0) takes the inputs in groups of ``2^i`` blocks, and in each the half
    blocks of even number before those of odd number.

    Attributes:
        turn: ``R - I``, ``[m, n, b, b]`` with ``n * b = in`` (with a convolution's window).
        rescale: ``[out]``, if trained.
    """

    kind: ClassVar[str] = "BOFT"

    rescale: Tensor | None = None

    def fits(self, shape: torch.Size) -> bool:
        """Whether the blocks cover the inputs, and every stage's groups divide them."""
        stages, blocks, _, size = self.turn.shape
        if len(shape) < 2 or torch.Size(shape[1:]).numel() != self.shape[0] or stages > blocks.bit_length():
            return False
        whole_groups = stages == 1 or (size % 2 == 0 and blocks % 2 ** (stages - 1) == 0)
        return whole_groups and covers(self.rescale, shape[0])

    def patched(self, weight: Tensor, strength: float) -> Tensor:
        """Return the turned weight, float32."""
        if strength == 0:
            return weight.float()
        base, turn = weight.float(), self.turn.to(weight.device)
        rows = base.flatten(1).T  # an input each
        for stage, blocks in enumerate(turn):
            order = _order(len(rows), blocks.shape[-1], stage).to(rows.device)
            turned = torch.empty_like(rows)
            turned[order] = rows
            turned = turned.reshape(len(blocks), blocks.shape[-1], -1)
            rows = (turned + blocks @ turned).reshape(rows.shape)[order]
        whole = rows.T.reshape(base.shape)
        if self.rescale is not None:
            whole = whole * column(self.rescale, base)
        return torch.lerp(base, whole, strength)


def _order(inputs: int, size: int, stage: int) -> Tensor:
    """Where each place of a stage is in the model's order: even half blocks of every group, then odd ones."""
    places = torch.arange(inputs)
    if stage == 0:
        return places
    halves = places.reshape(-1, 2 ** (stage + 1), size // 2)
    return torch.cat((halves[:, 0::2], halves[:, 1::2]), 1).flatten()
