"""Paint a table of scenes, all at once, on any device: backdrops first, then the objects over them.

Knows horizons, mountains and how to lay a drawing over a picture. Does not know captions, latents or how scenes are
drawn by lot. Lengths within a scenery are shares of the canvas's height.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.second.art import LEVELS, SIDE, Art
from training.second.tables import MOST, PEAKS, STARS, Table

ROCK, CAP, SUN = (112, 116, 140), (244, 247, 255), (255, 240, 190)


@dataclass(frozen=True)
class Grid:
    """Where each pixel is: ``down`` and ``across`` (n, height, width) on the canvas, and the size of a ``pixel``."""

    down: Tensor
    across: Tensor
    pixel: Tensor


def wide(column: Tensor) -> Tensor:
    """A number for each scene, ready to meet (n, height, width)."""
    return column[:, None, None]


def soft(inside: Tensor, pixel: Tensor) -> Tensor:
    """A signed distance as coverage 0..1, about a pixel wide at the edge."""
    return (inside / pixel + 0.5).clamp(0, 1)


def over(made: Tensor, share: Tensor, colour: Tensor) -> Tensor:
    """A colour (n, 3, ...) laid over pictures (n, 3, height, width) where ``share`` (n, height, width) says."""
    return made + share[:, None] * (colour - made)


def named(values: tuple[int, int, int], like: Tensor) -> Tensor:
    """An RGB value of 0..255 as (1, 3, 1, 1) of 0..1."""
    return torch.tensor(values, device=like.device, dtype=torch.float32)[None, :, None, None] / 255


def slope(stops: Tensor, share: Tensor) -> Tensor:
    """Colours between stops (n, k, 3); ``share`` (n, height, width) runs from 0 to 1."""
    share = share.clamp(0, 1) * (stops.shape[1] - 1)
    made = stops[:, 0, :, None, None].expand(-1, -1, *share.shape[1:])
    for index in range(stops.shape[1] - 1):
        step = (stops[:, index + 1] - stops[:, index])[:, :, None, None]
        made = made + step * (share - index).clamp(0, 1)[:, None]
    return made


def grid(height: int, width: int, window: Tensor) -> Grid:
    """The pixels' places on the canvas."""
    top, left, high = (wide(window[:, at]) for at in (0, 1, 2))
    rows = torch.arange(height, device=window.device)[None, :, None]
    columns = torch.arange(width, device=window.device)[None, None]
    down = ((rows + top + 0.5) / high).expand(-1, height, width)
    across = ((columns + left + 0.5) / high).expand(-1, height, width)
    return Grid(down, across, 1 / high)


def sun(made: Tensor, at: Grid, lots: Tensor, shines: Tensor) -> Tensor:
    """A disc that sets behind the horizon, and its glow."""
    size = wide(lots[:, 2])
    far = torch.hypot(at.down - wide(lots[:, 0]) + 0.4 * size, at.across - wide(lots[:, 1]))
    share = (0.35 * torch.exp(-6 * far) + soft(size - far, at.pixel)).clamp(0, 1)
    return over(made, wide(shines) * share, named(SUN, made))


def stars(made: Tensor, at: Grid, places: Tensor) -> Tensor:
    """Small white discs."""
    share = torch.zeros_like(at.down)
    for index in range(STARS):
        y, x, size = (wide(places[:, index, column]) for column in range(3))
        share = torch.maximum(share, soft(size - torch.hypot(at.down - y, at.across - x), at.pixel))
    return over(made, 0.95 * share, named((242, 242, 242), made))


def mountains(made: Tensor, at: Grid, peaks: Tensor, lots: Tensor, light: Tensor, there: Tensor) -> Tensor:
    """A range with snow on its tops, behind the horizon."""
    height, snow = torch.zeros_like(at.down), torch.full_like(at.down, 9.0)
    for index in range(PEAKS):
        top, middle, steep, line = (wide(peaks[:, index, column]) for column in range(4))
        side = top - (at.across - middle).abs() * steep
        snow = torch.where(side > height, line, snow)
        height = torch.maximum(height, side)
    above = wide(lots[:, 0]) - at.down
    ragged = 0.012 * torch.sin(at.across * 61 + wide(lots[:, 5])) + 0.008 * torch.sin(at.across * 137)
    rock = over(named(ROCK, made), soft(above - snow - ragged, at.pixel), named(CAP, made))
    shaded = rock * light[:, :, None, None] * (0.85 + 0.5 * above.clamp(0, 0.4))[:, None]
    return over(made, wide(there) * soft(height - above, at.pixel), shaded)


def ground(made: Tensor, at: Grid, land: Tensor, lots: Tensor, light: Tensor, flags: Tensor) -> Tensor:
    """Land or water below the horizon."""
    horizon, bend, length, phase, dune = (wide(lots[:, column]) for column in (0, 3, 4, 5, 6))
    there, sea, desert = (wide(flags[:, column]) for column in (0, 1, 2))
    below = at.down - horizon - (1 - sea) * (bend + 0.018 * torch.sin(at.across * length + phase))
    surface = slope(land, below / (1 - horizon).clamp(min=0.01)) * light[:, :, None, None]
    ripple = torch.sin(below * 160 / (0.35 + 3 * below.clamp(min=0)) + 2 * torch.sin(at.across * 9)) > 0.75
    surface = surface + (0.07 * sea * ripple)[:, None] * light[:, :, None, None]
    dunes = torch.sin((below * 5 + 0.25 * torch.sin(at.across * 3 + dune)) * 9)
    surface = surface * (1 + 0.05 * desert * dunes)[:, None]
    return over(made, there * soft(below, at.pixel), surface)


def backdrops(table: Table, device: torch.device) -> Tensor:
    """What is behind the objects (n, 3, height, width), 0..1."""
    colour = torch.from_numpy(table.colour).to(device)
    made = colour[:, :, None, None].expand(-1, -1, table.height, table.width).clone()
    picked = np.nonzero(table.colour[:, 0] < 0)[0]
    if not len(picked):
        return made
    rows = torch.from_numpy(picked).to(device)
    columns = (table.window, table.sky, table.land, table.light, table.flags, table.lots, table.peaks, table.stars)
    window, sky, land, light, flags, lots, peaks, places = (torch.from_numpy(c[picked]).to(device) for c in columns)
    at = grid(table.height, table.width, window)
    scene = slope(sky, at.down / wide(lots[:, 0]))
    scene = sun(scene, at, lots, flags[:, 3])
    if table.flags[picked, 4].any():
        dark = torch.from_numpy(np.nonzero(table.flags[picked, 4])[0]).to(device)
        there = Grid(at.down[dark], at.across[dark], at.pixel[dark])
        scene[dark] = stars(scene[dark], there, places[dark])
    scene = mountains(scene, at, peaks, lots, light, flags[:, 5])
    made[rows] = ground(scene, at, land, lots, light, flags).clamp(0, 1)
    return made


def level_for(side: float) -> int:
    """The smallest level of the drawings that is no smaller than an object, or the largest."""
    return min((level for level in LEVELS if level >= side), default=SIDE)


def lay(made: Tensor, table: Table, art: Art, which: int) -> None:
    """Draw every scene's object of one place in the order over the pictures, in place."""
    things, device = table.things[:, which], made.device
    for level in LEVELS:
        rows = [row for row, thing in enumerate(things) if thing[0] >= 0 and level_for(thing[1]) == level]
        if not rows:
            continue
        spot = torch.from_numpy(things[rows]).to(device)
        window = torch.from_numpy(table.window[rows]).to(device)
        drawings = art.levels[level][spot[:, 0].long()].float() / 255
        y = (torch.arange(table.height, device=device)[None] + 0.5 + window[:, :1] - spot[:, 2:3]) * 2 / spot[:, 1:2]
        x = (torch.arange(table.width, device=device)[None] + 0.5 + window[:, 1:2] - spot[:, 3:4]) * 2 / spot[:, 1:2]
        places = torch.stack([x[:, None].expand(-1, table.height, -1), y[:, :, None].expand(-1, -1, table.width)], -1)
        laid = F.grid_sample(drawings, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        made[rows] = made[rows] * (1 - laid[:, 3:]) + laid[:, :3]


def render(table: Table, art: Art) -> Tensor:
    """The pictures (n, 3, height, width), -1..1, where the drawings are."""
    made = backdrops(table, art.device)
    for which in range(MOST):
        lay(made, table, art, which)
    size = (table.height, table.width)
    for sharp in sorted(set(table.window[:, 4].tolist()) - {1.0}):
        rows = [row for row, value in enumerate(table.window[:, 4]) if value == sharp]
        small = (max(8, round(size[0] * sharp)), max(8, round(size[1] * sharp)))
        shrunk = F.interpolate(made[rows], size=small, mode="bilinear", antialias=True)
        made[rows] = F.interpolate(shrunk, size=size, mode="bicubic").clamp(0, 1)
    return made * 2 - 1
