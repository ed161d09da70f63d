"""What the UNet sees in one step: latents, captions, noise levels and sizes, all decided by seed and step.

Knows pools and captions. Does not know networks or losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.captions import caption
from training.pools import Pool, reframe

EMPTY, DROPPED = 0.05, 0.07
OFFSET_NOISE = 0.1


@dataclass(frozen=True)
class Frame:
    """One picture size of a stage (in latent pixels), the pool it is cut from, and how often it comes."""

    height: int
    width: int
    pool: int
    often: float = 1.0


@dataclass(frozen=True)
class Batch:
    """One step's material. ``kept`` is 0 where the conditioning is dropped to zeros."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    kept: Tensor
    sizes: Tensor


def timesteps(rng: np.random.Generator, count: int, noisy: float) -> Tensor:
    """Evenly spread noise levels; the given share of them from the noisier part only."""
    spread = (np.arange(count) + rng.random(count)) / count
    rng.shuffle(spread)
    low = np.where(rng.random(count) < noisy, 300, 0)
    return torch.from_numpy((low + spread * (1000 - low)).astype(np.int64))


def coarse_noise(rng: np.random.Generator, shape: tuple[int, ...], strength: float) -> np.ndarray:
    """Noise in blocks of 4, 8 and 16 latents, of random strength for each picture.

    SDXL's schedule ends at sigma 14.6, where a large picture's layout can still be read off its noisy latents. A model
    trained on white noise alone learns to read it there, and finds nothing to read when it starts from pure noise.
    Coarse noise drowns the layout, so that it has to come from the caption.
    """
    count, channels, high, wide = shape
    total = np.zeros(shape, np.float32)
    for cell in (4, 8, 16):
        grid = rng.standard_normal((count, channels, -(-high // cell), -(-wide // cell)), np.float32)
        blocks = grid.repeat(cell, 2).repeat(cell, 3)[:, :, :high, :wide]
        total += blocks * rng.uniform(0, strength, (count, 1, 1, 1)).astype(np.float32)
    return total


def batch(
    pools: dict[int, Pool],
    frames: tuple[Frame, ...],
    count: int,
    noisy: float,
    seed: int,
    step: int,
    coarse: float = 0.0,
) -> Batch:
    """The batch of one step."""
    rng = np.random.default_rng((seed, step))
    weights = np.array([frame.often for frame in frames])
    frame = frames[int(rng.choice(len(frames), p=weights / weights.sum()))]
    source = pools[frame.pool]
    reach = source.side // 96
    if frame.height * frame.width > 64 * 64:
        count = max(2, count * 64 * 64 // (frame.height * frame.width))
    rows = rng.integers(len(source.shows), size=count)
    latents, texts = [], []
    for row in rows:
        down, across = (int(v) for v in rng.integers(-reach, reach + 1, 2))
        latents.append(reframe(source.latents[row].float(), frame.height, frame.width, (down, across)))
        subject, style, ground = (int(v) for v in source.shows[row])
        texts.append("" if rng.random() < EMPTY else caption(rng, subject, style, ground))
    shape = (count, 4, frame.height, frame.width)
    noise = rng.standard_normal(shape, np.float32) + OFFSET_NOISE * rng.standard_normal((count, 4, 1, 1), np.float32)
    if coarse:
        noise += coarse_noise(rng, shape, coarse)
    high, wide = 8 * frame.height, 8 * frame.width
    return Batch(
        torch.stack(latents),
        torch.from_numpy(noise),
        timesteps(rng, count, noisy),
        texts,
        torch.from_numpy((rng.random(count) > DROPPED).astype(np.float32)),
        torch.tensor([[high, wide, 0, 0, high, wide]], dtype=torch.float32).expand(count, -1),
    )
