"""Measures on pictures that no network takes part in: background, count, place, squares, seams, grain, sharpness.

Each works on (height, width, 3) arrays of 0..255. What each is worth is told by taking it on composed pictures as well
(``evaluate`` does). Knows pixels only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from training.second.subjects import COLOURS
from training.subjects import BACKGROUNDS

Pixels = NDArray[np.float64]

SIDE = 128  # objects are looked for at this size
FAR = 75.0  # sum of channel differences from the background from which on it is an object
LEAST, GROWN = 0.012, 3  # share of the picture that an object has at least; pixels that bridge a gap in it
MIDDLE = (0.42, 0.58)


@dataclass(frozen=True)
class Spot:
    """One object found: its middle and its box (top, left, bottom, right), as shares of the picture."""

    y: float
    x: float
    box: tuple[float, float, float, float]


def border(picture: Pixels) -> Pixels:
    """The median colour of a frame of a twentieth of the side."""
    width = max(1, min(picture.shape[:2]) // 20)
    frame = np.ones(picture.shape[:2], bool)
    frame[width:-width, width:-width] = False
    return np.asarray(np.median(picture[frame], 0))


def background(picture: Pixels) -> str:
    """The named colour closest to the border's."""
    seen = border(picture)
    return min(COLOURS, key=lambda name: float(np.abs(seen - np.array(BACKGROUNDS[name])).sum()))


def grain(picture: Pixels) -> float:
    """Deviation of the border's pixels from its median colour: 0 on a plain background without noise."""
    width = max(1, min(picture.shape[:2]) // 20)
    frame = np.ones(picture.shape[:2], bool)
    frame[width:-width, width:-width] = False
    return float((picture[frame] - border(picture)).std())


def sharpness(picture: Pixels) -> float:
    """How steep the steepest hundredth of all edges is, in levels a pixel."""
    grey = picture.mean(-1)
    steep = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    return float(np.percentile(steep, 99))


def objects(picture: Pixels) -> list[Spot]:
    """What stands out from a plain background, largest first; parts close together are one."""
    small = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    mask = np.abs(small - border(small)).sum(-1) > FAR
    labels = labelled(mask)
    found: list[tuple[float, Spot]] = []
    for index in np.unique(labels[labels > 0]):
        inside = mask & (labels == index)
        share = float(inside.mean())
        if share >= LEAST:
            rows, columns = np.nonzero(inside)
            box = (rows.min() / SIDE, columns.min() / SIDE, (rows.max() + 1) / SIDE, (columns.max() + 1) / SIDE)
            middle = (float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2)
            found.append((share, Spot(*middle, (float(box[0]), float(box[1]), float(box[2]), float(box[3])))))
    return [spot for _, spot in sorted(found, key=lambda pair: -pair[0])]


def labelled(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A number for each connected part of a mask, gaps of up to ``2 * GROWN`` pixels bridged; 0 outside."""
    near = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * GROWN + 1, 1, GROWN)
    labels = torch.arange(1, mask.size + 1, dtype=torch.float32).view(1, *mask.shape) * near
    while True:  # the largest number in a part spreads over all of it
        spread = F.max_pool2d(labels, 3, 1, 1) * near
        if torch.equal(spread, labels):
            return labels[0].numpy().astype(np.int64)
        labels = spread


def place(spot: Spot) -> str:
    """Where an object is, in the words of the captions; empty in the middle."""
    down = "top" if spot.y < MIDDLE[0] else "bottom" if spot.y > MIDDLE[1] else ""
    across = "left" if spot.x < MIDDLE[0] else "right" if spot.x > MIDDLE[1] else ""
    return f"{down} {across}".strip()


def cut(picture: Pixels, spot: Spot, margin: float = 0.12) -> Pixels:
    """One object on a square of the background, as the judge expects it."""
    high, wide = picture.shape[:2]
    top, left, bottom, right = spot.box
    side = int(max((bottom - top) * high, (right - left) * wide) * (1 + 2 * margin))
    y, x = int(spot.y * high - side / 2), int(spot.x * wide - side / 2)
    made = np.empty((side, side, 3))
    made[:] = border(picture)
    rows, columns = slice(max(y, 0), min(y + side, high)), slice(max(x, 0), min(x + side, wide))
    made[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = picture[rows, columns]
    return made


def squares(picture: Pixels, cell: int = 16) -> float:
    """Variance inside squares of the grid against a grid half a square away: 1 where there are no squares."""

    def within(shift: int) -> float:
        count = (min(picture.shape[:2]) - cell) // cell
        inner = picture[shift : shift + count * cell, shift : shift + count * cell]
        return float(inner.reshape(count, cell, count, cell, 3).var((1, 3)).mean())

    return within(0) / max(within(cell // 2), 1e-9)


def seam(picture: Pixels, column: int, reach: int = 24) -> float:
    """The step across a column against the steps beside it: 1 where nothing is to be seen."""
    steps = np.abs(np.diff(picture, axis=1)).mean((0, 2))
    beside = np.r_[steps[column - reach : column - 2], steps[column + 2 : column + reach]]
    return float(steps[column - 1] / max(beside.mean(), 1e-9))


def thumbnail(picture: Pixels, side: int = 32) -> Pixels:
    """The picture in small, 0..1."""
    small = Image.fromarray(picture.astype(np.uint8)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


def distance(one: Pixels, other: Pixels) -> float:
    """Root mean square difference of two thumbnails."""
    return float(np.sqrt(((one - other) ** 2).mean()))
