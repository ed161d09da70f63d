"""Pictures turned into latents, once per size, and kept on disk.

Knows composition (one object on one colour) and the finished autoencoder. Does not know captions. A latent can be
shifted or widened afterwards without encoding again, because its margin is plain background.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.art import Pixels, shrink, subject_art
from training.crops import Picture, blend
from training.places import CACHE
from training.subjects import BACKGROUNDS, STYLES, SUBJECTS

SCALES = (0.70, 0.86)
JITTER = 0.02


@dataclass(frozen=True)
class Pool:
    """Latents (n, 4, side, side) and, row by row, the subject, style and background they show."""

    latents: Tensor
    shows: NDArray[np.int64]

    def only(self, subjects: Container[int], style: int) -> Pool:
        """The rows that show some subjects in one style."""
        keep = [row for row, (subject, look, _) in enumerate(self.shows) if subject in subjects and look == style]
        return Pool(self.latents[keep], self.shows[keep])

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        return int(self.latents.shape[-1])


def place(rng: np.random.Generator, side: int) -> tuple[int, int, int]:
    """A size and a corner for the object: near the middle and wholly inside the frame."""
    size = round(side * rng.uniform(*SCALES))
    free = side - size
    y, x = (int(np.clip(free / 2 + side * rng.uniform(-JITTER, JITTER), 0, free)) for _ in range(2))
    return size, y, x


def compose(art: Pixels, side: int, colour: tuple[int, int, int], spot: tuple[int, int, int]) -> Picture:
    """One object on one colour."""
    size, y, x = spot
    sheet = np.zeros((side, side, 4), np.uint8)
    sheet[y : y + size, x : x + size] = shrink(art, size)
    return blend(sheet, np.asarray(colour, np.float32))


def combinations(rng: np.random.Generator, grounds: int) -> list[tuple[int, int, int]]:
    """Every subject in every style, on the given number of backgrounds each."""
    rows = []
    for subject in range(len(SUBJECTS)):
        for style in range(len(STYLES)):
            rows += [(subject, style, int(g)) for g in rng.permutation(len(BACKGROUNDS))[:grounds]]
    return rows


@torch.no_grad()
def build(vae: AutoencoderKL, side: int, grounds: int, seed: int) -> Pool:
    """Compose and encode a whole pool; ``side`` counts pixels."""
    rng = np.random.default_rng((seed, side))
    art, colours = np.asarray(subject_art()), list(BACKGROUNDS.values())
    rows = combinations(rng, grounds)
    batch = max(1, 256 * 256 * 8 // side**2)
    latents = []
    for at in range(0, len(rows), batch):
        some = [compose(art[s, k], side, colours[g], place(rng, side)) for s, k, g in rows[at : at + batch]]
        pictures = torch.from_numpy(np.stack(some)).contiguous(memory_format=torch.channels_last)
        latents.append(vae.encode(pictures).latent_dist.mean.contiguous().half())
    return Pool(torch.cat(latents), np.asarray(rows))


def pool(vae: Callable[[], AutoencoderKL], side: int, grounds: int, seed: int = 5, folder: Path = CACHE) -> Pool:
    """The pool of one size, from disk where it is there."""
    kept = folder / f"pool-{side}-{grounds}-{seed}.pt"
    if not kept.exists():
        built = build(vae(), side, grounds, seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": built.latents, "shows": torch.from_numpy(built.shows)}, kept)
    state = torch.load(kept, weights_only=True)
    return Pool(state["latents"], state["shows"].numpy())


def along(length: int, wanted: int, shift: int, border: int) -> Tensor:
    """Which old rows make the new ones: the ends stay, the margin is stretched or cut, the middle moves."""
    index = torch.arange(wanted) - (wanted - length) // 2 - shift
    index = index.clamp(border, length - 1 - border)
    index[:border] = torch.arange(border)
    index[wanted - border :] = torch.arange(length - border, length)
    return index


def reframe(latent: Tensor, height: int, width: int, shift: tuple[int, int]) -> Tensor:
    """Move the object by whole latent pixels and widen the frame with background."""
    side = latent.shape[-1]
    border = 2 if side >= 32 else 1
    rows, columns = along(side, height, shift[0], border), along(side, width, shift[1], border)
    return latent[:, rows][:, :, columns]
