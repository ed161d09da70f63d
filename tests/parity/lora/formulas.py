"""Closed formulas of every kind in float64, each from its paper or trainer, by the most literal way there is.

Matrices are built whole (block diagonals, permutations, Kronecker products entry by entry), so that nothing here shares
a shortcut with the library. ``w`` is a weight, ``s`` the strength.
"""

import torch
from torch import Tensor


def low_rank(down: Tensor, up: Tensor) -> Tensor:
    """``up @ down`` at every place of the window (Hu et al. 2021)."""
    if down.ndim == 2:
        return up.reshape(up.shape[0], -1) @ down
    places = [
        up.reshape(up.shape[0], -1) @ down[:, :, y, x] for y in range(down.shape[2]) for x in range(down.shape[3])
    ]
    return torch.stack(places, -1).reshape(up.shape[0], down.shape[1], *down.shape[2:])


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left^T @ core[..., y, x] @ right`` at every place of the window (LyCORIS' Tucker form, sides ``[r, n]``)."""
    out = torch.zeros(left.shape[1], right.shape[1], *core.shape[2:], dtype=torch.float64)
    for y in range(core.shape[2]):
        for x in range(core.shape[3]):
            out[:, :, y, x] = left.T @ core[:, :, y, x] @ right
    return out


def kronecker(small: Tensor, large: Tensor) -> Tensor:
    """``small ⊗ large`` at every place of the window (Yeh et al. 2023, LoKr)."""
    if large.ndim == 2:
        return torch.kron(small, large)
    out = torch.zeros(
        small.shape[0] * large.shape[0], small.shape[1] * large.shape[1], *large.shape[2:], dtype=torch.float64
    )
    for y in range(large.shape[2]):
        for x in range(large.shape[3]):
            out[:, :, y, x] = torch.kron(small, large[:, :, y, x])
    return out


def added(w: Tensor, s: float, delta: Tensor) -> Tensor:
    """Additive kinds: ``w + s * delta``."""
    return w + s * delta.reshape(w.shape)


def decomposed(w: Tensor, s: float, delta: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """DoRA (Liu et al. 2024): ``m * (w + D) / norm(w + D)``, at strength ``s`` that part of the way."""
    moved = w + delta.reshape(w.shape)
    whole = moved.clone()
    for i in range(w.shape[axis]):
        row = moved.select(axis, i)
        whole.select(axis, i).copy_(magnitude.flatten()[i] * row / row.norm())
    return w + s * (whole - w)


def generalized(w: Tensor, s: float, before: Tensor, after: Tensor, beside: Tensor, scale: float) -> Tensor:
    """GLoRA (Chavan et al. 2023) as LyCORIS trains it: ``w + s * scale * (w A + B)``, A over the input channels."""
    through = before @ after
    changed = torch.zeros_like(w)
    if w.ndim == 2:
        changed = w @ through
    else:
        for y in range(w.shape[2]):
            for x in range(w.shape[3]):
                changed[:, :, y, x] = w[:, :, y, x] @ through
    return w + s * scale * (changed + beside.reshape(w.shape))


def cayley(blocks: Tensor, constraint: float) -> Tensor:
    """``(I + Q)(I - Q)^-1``, ``Q = B - B^T``, its norm over all blocks cut to the constraint (kohya, LyCORIS)."""
    skew = blocks - blocks.transpose(-1, -2)
    norm = skew.square().sum().sqrt()
    if constraint > 0 and norm > constraint:
        skew = skew * constraint / (norm + 1e-8)
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def output_rotated(w: Tensor, s: float, rotation: Tensor, rescale: Tensor | None) -> Tensor:
    """diag-OFT: ``rescale * R^T w``, at strength ``s`` that part of the way."""
    turned = torch.block_diag(*rotation).T @ w.flatten(1)
    if rescale is not None:
        turned = rescale.reshape(-1, 1) * turned
    return w + s * (turned.reshape(w.shape) - w)


def butterfly(w: Tensor, s: float, rotation: Tensor, rescale: Tensor | None) -> Tensor:
    """BOFT (Liu et al. 2023) as LyCORIS trains it: stage after stage, each rotation that part ``s`` of its way."""
    stages, _, size, _ = rotation.shape
    rows = w.flatten(1)
    outputs = rows.shape[0]
    identity = torch.eye(outputs, dtype=torch.float64)
    for stage in range(stages):
        apart = 2**stage * size // 2
        order = [
            start + half * apart + place
            for start in range(0, outputs, 2 * apart)
            for place in range(apart)
            for half in (0, 1)
        ]
        shuffle = identity[order]
        blocks = torch.block_diag(*rotation[stage])
        rows = shuffle.T @ ((1 - s) * identity + s * blocks) @ shuffle @ rows
    if rescale is not None:
        rows = (1 + s * (rescale.reshape(-1, 1) - 1)) * rows
    return rows.reshape(w.shape)


def butterfly_of_inputs(w: Tensor, s: float, blocks: Tensor, scale: Tensor) -> Tensor:
    """BOFT as PEFT trains it: ``scale * w (B_m ... B_1)^T``, ``B = P R P^T``, ``R`` the Cayley transform of ``-Q / 2``.

    ``P`` takes the even half blocks of a group of ``2^stage`` blocks before the odd ones.
    """
    size, inputs = blocks.shape[-1], w.flatten(1).shape[1]
    identity, whole = torch.eye(inputs, dtype=torch.float64), torch.eye(inputs, dtype=torch.float64)
    for stage, stage_blocks in enumerate(blocks):
        order = list(range(inputs))
        if stage:
            half, group = size // 2, size * 2**stage
            order = [
                start + chunk * half + place
                for start in range(0, inputs, group)
                for parity in (0, 1)
                for chunk in range(parity, group // half, 2)
                for place in range(half)
            ]
        shuffle = identity[order]
        rotation = torch.block_diag(*cayley(-stage_blocks / 2, 0.0))
        whole = shuffle @ rotation @ shuffle.T @ whole
    turned = scale * (w.flatten(1) @ whole.T)
    return w + s * (turned.reshape(w.shape) - w)


def neumann(upper: Tensor, size: int) -> Tensor:
    """OFTv2's rotations: ``I + 2Q + 2Q² + 2Q³ + Q⁴`` of the upper triangles (PEFT, OneTrainer)."""
    rotations = []
    for row in upper:
        skew = torch.zeros(size, size, dtype=torch.float64)
        numbers = iter(row)
        for i in range(size):
            for j in range(i + 1, size):
                skew[i, j] = next(numbers)
        skew = skew - skew.T
        square = skew @ skew
        rotations.append(
            torch.eye(size, dtype=torch.float64) + 2 * skew + 2 * square + 2 * skew @ square + square @ square
        )
    return torch.stack(rotations)


def input_rotated(w: Tensor, s: float, rotation: Tensor, by_weight: bool) -> Tensor:
    """OFTv2: ``w R^T`` (the layer's input is turned); OneTrainer turns a convolution's weight instead: ``w R``."""
    rows = w.flatten(1)
    blocks = rotation if len(rotation) > 1 else rotation.repeat(rows.shape[1] // rotation.shape[-1], 1, 1)
    whole = torch.block_diag(*blocks)
    turned = rows @ (whole if by_weight else whole.T)
    return w + s * (turned.reshape(w.shape) - w)


def scaled(w: Tensor, s: float, change: Tensor, axis: int) -> Tensor:
    """IA3 (Liu et al. 2022), written from 1: ``w * (1 + s * change)`` along an axis."""
    sides = [1] * w.ndim
    sides[axis] = -1
    return w * (1 + s * change.reshape(sides))


def towards(w: Tensor, s: float, other: Tensor) -> Tensor:
    """A weight that replaces the model's, that part of the way."""
    return w + s * (other.reshape(w.shape) - w)
