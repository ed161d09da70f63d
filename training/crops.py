"""Random crops of composed pictures: what the autoencoder learns from.

Knows art and how to lay it over a background. Does not know captions, latents or networks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.art import LEVELS, Pixels, other_art, shrink, subject_art
from training.subjects import BACKGROUNDS

Picture = NDArray[np.float32]


def blend(art: Pixels, background: NDArray[np.float32]) -> Picture:
    """Lay RGBA pixels over a colour (or a picture) of 0..255; the result is -1..1, channels first."""
    alpha = art[..., 3:].astype(np.float32) / 255
    flat = art[..., :3].astype(np.float32) * alpha + background * (1 - alpha)
    return np.ascontiguousarray((flat / 127.5 - 1).transpose(2, 0, 1))


def art_by_size(others: int) -> dict[int, list[Pixels]]:
    """Every drawing at every size the crops are cut from."""
    art = [picture for subject in subject_art() for picture in subject]
    sizes = {size: [shrink(picture, size) for picture in art] for size in LEVELS}
    for picture in other_art(others) if others else []:
        for size in (256, 128):
            sizes[size].append(shrink(picture, size))
    return sizes


def background(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A named colour, any colour, or a slope between two."""
    named = np.array(list(BACKGROUNDS.values()), np.float32)
    kind = rng.random()
    if kind < 0.5:
        return np.asarray(named[rng.integers(len(named))])
    if kind < 0.8:
        return rng.uniform(0, 255, 3).astype(np.float32)
    ends = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    slope = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    mixed = np.broadcast_to(ends[0] * (1 - slope) + ends[1] * slope, (size, size, 3))
    return mixed if rng.random() < 0.5 else mixed.transpose(1, 0, 2)


def crops(sizes: dict[int, list[Pixels]], batch: int, side: int, seed: int, step: int) -> Tensor:
    """One batch of crops; which one is decided by the seed and the step alone."""
    rng = np.random.default_rng((seed, step))
    levels = list(sizes)
    out = []
    for _ in range(batch):
        size = levels[rng.integers(len(levels))]
        art = sizes[size][rng.integers(len(sizes[size]))]
        margin = side // 4
        padded = np.pad(art, ((margin, margin), (margin, margin), (0, 0)))
        y, x = rng.integers(0, size + 2 * margin - side + 1, 2)
        out.append(blend(padded[y : y + side, x : x + side], background(rng, side)))
    return torch.from_numpy(np.stack(out))


def stream(sizes: dict[int, list[Pixels]], batch: int, side: int, seed: int, start: int) -> Iterator[Tensor]:
    """Batches from the given step on."""
    step = start
    while True:
        yield crops(sizes, batch, side, seed, step)
        step += 1
