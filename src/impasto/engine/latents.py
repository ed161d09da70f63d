"""Starting latents: seeds to noise, start pictures to noised latents, masks to the latent grid.

Knows the latent grid (8 pixels a cell, 4 channels). Knows no network, schedule or request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from impasto.types import LIMITS

LATENT_CHANNELS = 4
PIXELS_PER_CELL = LIMITS.side_multiple


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


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """What the VAE's encoder says of a picture: mean and standard deviation of its latents, ``[4, H/8, W/8]``."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw one of the latents."""
        return self.mean + self.std * noise_like(self.mean, generator)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The part of a picture that inpainting leaves alone, held in place at every noise level.

    Attributes:
        clean: Latents of the start picture, ``[4, H/8, W/8]``.
        noise: The noise they are seen through, the same at every step.
        mask: How much is painted: 1 all, 0 nothing, ``[1, H/8, W/8]``.

    Source: Avrahami et al. 2022 (arXiv:2206.02779), blended latent diffusion.
    """

    clean: Tensor
    noise: Tensor
    mask: Tensor

    def hold(self, latents: Tensor, sigma: float) -> Tensor:
        """Return latents at noise level ``sigma`` with the kept part put back."""
        return (1 - self.mask) * (self.clean + sigma * self.noise) + self.mask * latents


def cell_mask(mask: Tensor) -> Tensor:
    """Bring a pixel mask ``[H, W]`` (0 keep, 1 paint) to the latent grid, ``[1, H/8, W/8]``.

    Each cell takes the pixel at its corner, as the inpainting networks were trained. A mask too thin to hit any
    corner takes each cell's largest value.
    """
    cells = mask[None, ::PIXELS_PER_CELL, ::PIXELS_PER_CELL]
    if cells.any() or not mask.any():
        return cells
    return torch.nn.functional.max_pool2d(mask[None], PIXELS_PER_CELL)
