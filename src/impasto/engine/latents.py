"""Starting latents: seeds to noise.

Knows the latent grid (8 pixels a cell, 4 channels). Knows no network, schedule or request.
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENT_CHANNELS = 4
PIXELS_PER_CELL = 8


def latent_shape(width: int, height: int) -> tuple[int, int, int]:
    """Return ``(channels, rows, columns)`` of the latents of a picture of ``width`` x ``height`` pixels."""
    return (LATENT_CHANNELS, height // PIXELS_PER_CELL, width // PIXELS_PER_CELL)


def seeded(seed: int) -> torch.Generator:
    """Return the generator of one image.

    The CPU generator gives the same numbers on every machine, so a seed names a picture whatever the device and
    whatever else is in the batch.
    """
    return torch.Generator("cpu").manual_seed(seed)


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw unit-variance noise of one image, ``[4, H/8, W/8]`` float32, on the CPU."""
    return torch.randn((1, *shape), generator=generator, dtype=torch.float32)[0]


def noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Draw fresh noise for latents, where they are."""
    return noise(tuple(latents.shape), generator).to(latents.device)
