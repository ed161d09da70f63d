"""The VAE at work: pictures to latents, latents to pictures, and rough previews.

Knows pixels, latents and the VAE's own scale. Knows no noise, requests or files.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from impasto.models.residence import Residence
from impasto.models.tiling import decode, encode

PIXELS_PER_CELL = 8
CHART_LEVELS = (-0.8, -0.3, 0.3, 0.8)  # of each colour of the chart that previews are fitted to
CHART_CELLS = 4  # a side of each of its patches

Tiles = Callable[[int, torch.dtype], bool]


class Vae:
    """Encodes and decodes one picture at a time, from any thread; takes and gives float32.

    Args:
        vae: diffusers' network.
        device: Where it runs.
        residence: Brings it there.
        tiles: Whether a picture of so many pixels in such a number format is to be done in tiles.
    """

    def __init__(self, vae: Any, device: torch.device, residence: Residence, tiles: Tiles = lambda *_: False) -> None:
        self.network = vae
        self._device = device
        self._residence = residence
        self._tiles = tiles
        self._colours: Tensor | None = None
        self._alone = threading.Lock()  # tiling and the float32 retry change the network for as long as a call lasts

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents ``[4, h, w]`` of a picture ``[3, 8h, 8w]`` in -1 to 1."""
        tiling = self._tiles(pixels[0].numel(), self.network.dtype)
        with self._alone, self._residence.using("vae", self.network):
            mean, std = encode(self.network, pixels[None].to(self._device), tiling=tiling)
        shift, scale = self._normal()
        return (mean[0] - shift) / scale, std[0] / scale

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``[4, h, w]`` to a picture ``[8h, 8w, 3]``, uint8, on the CPU."""
        tiling = self._tiles(latents[0].numel() * PIXELS_PER_CELL**2, self.network.dtype)
        shift, scale = self._normal()
        unscaled = (latents.to(self._device) * scale + shift)[None]
        with self._alone, self._residence.using("vae", self.network):
            return _bytes(decode(self.network, unscaled, tiling=tiling)[0])

    def preview(self, latents: Tensor) -> Tensor:
        """Return a rough picture ``[h, w, 3]``, uint8, an eighth of the size: a linear guess at each cell's colour."""
        if self._colours is None:
            self._colours = self._fit_colours()
        weights, bias = self._colours[:-1], self._colours[-1]
        picture = torch.einsum("chw,ck->khw", latents.to(weights), weights) + bias[:, None, None]
        return _bytes(picture)

    def _normal(self) -> tuple[Tensor, Tensor]:
        """Shift and scale that bring the UNet's latents to the VAE's own, each ``[4, 1, 1]`` or ``[1, 1, 1]``."""
        config = self.network.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if not (mean and std):
            mean, std = [0.0], [1.0]
        shift, scale = (torch.tensor(values, device=self._device).view(-1, 1, 1) for values in (mean, std))
        return shift, scale / config.scaling_factor

    def _fit_colours(self) -> Tensor:
        """Fit colours to latents, ``[5, 3]``: encode a chart of flat patches and solve for the least squares."""
        colours = torch.tensor(list(itertools.product(CHART_LEVELS, repeat=3)))  # [64, 3]
        cells = colours.T.reshape(3, 8, 8).repeat_interleave(CHART_CELLS, 1).repeat_interleave(CHART_CELLS, 2)
        pixels = cells.repeat_interleave(PIXELS_PER_CELL, 1).repeat_interleave(PIXELS_PER_CELL, 2)
        latents = self.encode(pixels)[0].flatten(1).T.cpu()
        known = torch.cat([latents, torch.ones(len(latents), 1)], 1)
        fitted: Tensor = torch.linalg.lstsq(known, cells.flatten(1).T).solution
        return fitted


def _bytes(picture: Tensor) -> Tensor:
    """Turn ``[3, h, w]`` in -1 to 1 into ``[h, w, 3]`` uint8 on the CPU."""
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
