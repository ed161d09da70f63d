"""A store of encoded scenes that is renewed a little at every step, so that compositions are hardly met twice.

Scene number n of a reservoir is decided by its seed and n alone and lies at place n modulo the capacity; at step s the
scenes s * renewed and the next ``capacity`` are there. On a CPU the store is a file, so that a restart finds it full.
Knows scenes, pictures and the autoencoder. Does not know captions, noise or the UNet.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.second.art import Art
from training.second.render import render
from training.second.scene import Scene, draw
from training.second.tables import Table

EMPTY = -1


@dataclass(frozen=True)
class Material:
    """What a reservoir is filled with: latent height and width, who takes part, and the seed."""

    height: int
    width: int
    cast: int
    plain: float
    pairs: float
    core: float
    seed: int

    def scene(self, number: int) -> Scene:
        """The scene of a number."""
        rng = np.random.default_rng((self.seed, self.height, self.width, number))
        high, wide = 8 * self.height, 8 * self.width
        return draw(rng, high, wide, self.cast, plain=self.plain, pairs=self.pairs, core=self.core)


def first_at(step: int, renewed: float) -> int:
    """The lowest number in store at a step, where each step renews so many scenes (a fraction, perhaps)."""
    return math.floor(step * renewed)


class Reservoir:
    """Latents (capacity, 4, height, width) in half precision, and the number of the scene each one shows."""

    def __init__(
        self, material: Material, capacity: int, art: Art, vae: AutoencoderKL, folder: Path | None,
        paint: Callable[[Table, Art], Tensor] = render, look: str = "",
    ) -> None:  # fmt: skip
        self.material, self.capacity, self.art, self.vae = material, capacity, art, vae
        self.paint, self.look = paint, look
        shape = (capacity, 4, material.height, material.width)
        if folder is None:
            self.latents = torch.zeros(shape, dtype=torch.float16, device=art.device)
            self.numbers: NDArray[np.int64] = np.full(capacity, EMPTY, np.int64)
        else:
            self.latents = torch.from_numpy(mapped(folder / f"{self.name}.latents.npy", shape, np.float16, 0))
            self.numbers = mapped(folder / f"{self.name}.numbers.npy", (capacity,), np.int64, EMPTY)

    @property
    def name(self) -> str:
        """Of its files: whatever else would be found in them is another reservoir's."""
        m = self.material
        drawn = zlib.crc32(repr([m.scene(number) for number in range(8)]).encode())  # other scenes by other rules
        return f"{m.height}x{m.width}-{self.capacity}-{drawn:08x}{self.look}-{m.seed}"

    def missing(self, first: int) -> list[int]:
        """The numbers from ``first`` on that should be in store and are not."""
        wanted = first + (np.arange(self.capacity) - first) % self.capacity
        return sorted(int(n) for n in wanted[self.numbers != wanted])

    @torch.no_grad()
    def renew(self, numbers: list[int], table: Table) -> None:
        """Paint and encode some scenes, given as a table, and put them in their places."""
        device = self.art.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            given = self.paint(table, self.art).contiguous(memory_format=torch.channels_last)
            latents = self.vae.encode(given).latent_dist.mean
        places = [number % self.capacity for number in numbers]
        self.numbers[places] = EMPTY  # whoever is stopped here finds an empty place, not a torn one
        self.latents[places] = latents.half().contiguous()
        self.numbers[places] = numbers

    def at(self, places: Tensor) -> Tensor:
        """Latents in single precision."""
        return self.latents[places.to(self.latents.device)].float()


def chunk(area: int, device: torch.device) -> int:
    """How many pictures of so many latents are painted and encoded at once."""
    return max(1, (4 if device.type == "cpu" else 64) * 64 * 64 // area)


def mapped(path: Path, shape: tuple[int, ...], kind: type, filled: int) -> NDArray[Any]:
    """An array in a file, made where it is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".fresh")
        made = np.lib.format.open_memmap(beside, "w+", kind, shape)
        made[:] = filled
        made.flush()
        beside.replace(path)
    return np.lib.format.open_memmap(path, "r+")
