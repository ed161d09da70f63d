"""Scenes as numbers in rows: all that painting needs, without a Python object for each scene.

Knows scenes and the lots within a scenery (peaks, stars, dunes). Does not know pixels: ``render`` paints a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.second.scene import Ground, Scene
from training.second.subjects import COLOURS, LANDS, SKIES, STYLES
from training.subjects import BACKGROUNDS

Floats = NDArray[np.float32]

MOST, PEAKS, STARS = 3, 4, 26
SKY_COLOURS = {  # from the top to the horizon
    "day": ((84, 160, 235), (150, 205, 250), (215, 238, 255)),
    "sunset": ((92, 60, 140), (240, 110, 80), (255, 205, 110)),
    "night": ((10, 14, 46), (26, 32, 84), (58, 66, 128)),
}
LAND_COLOURS = {  # from the horizon to the bottom
    "sky": ((0, 0, 0), (0, 0, 0)),
    "desert": ((240, 200, 120), (205, 145, 75)),
    "meadow": ((130, 205, 90), (55, 140, 60)),
    "sea": ((70, 160, 215), (20, 75, 150)),
    "snow": ((250, 252, 255), (205, 220, 240)),
}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.98, 0.74, 0.66), "night": (0.34, 0.38, 0.56)}


@dataclass(frozen=True)
class Table:
    """Some scenes of one picture size (height, width); every array has a row for each.

    ``window``: top, left, canvas height, canvas width, sharpness. ``colour``: RGB 0..1, or -1 before a scenery.
    ``sky`` (n, 3, 3), ``land`` (n, 2, 3), ``light`` (n, 3): colours 0..1. ``flags``: land, sea, desert, sunset, night,
    mountains. ``lots``: horizon, sun's place and size, wave's height, length and phase, dune's phase.
    ``peaks`` (n, 4, 4): height, middle, steepness, snow line. ``stars`` (n, 26, 3): y, x, size.
    ``things`` (n, 3, 4): drawing (-1: none), side, middle y, middle x; pixels of the canvas.
    """

    height: int
    width: int
    window: Floats
    colour: Floats
    sky: Floats
    land: Floats
    light: Floats
    flags: Floats
    lots: Floats
    peaks: Floats
    stars: Floats
    things: Floats

    def __len__(self) -> int:
        """How many scenes."""
        return len(self.window)


NO_LOTS = ([1.0] + [0.0] * 6, np.zeros((PEAKS, 4), np.float32), np.zeros((STARS, 3), np.float32))


def lots(ground: Ground, aspect: float) -> tuple[list[float], Floats, Floats]:
    """What chance decides in a scenery: its numbers, its peaks, its stars."""
    if ground.plain:
        return NO_LOTS
    rng = np.random.default_rng(ground.seed)
    horizon = 1.0 if LANDS[ground.land] == "sky" else rng.uniform(0.55, 0.72)
    numbers = [
        horizon,
        rng.uniform(0.2, 0.8) * aspect,
        rng.uniform(0.07, 0.12),
        rng.uniform(-0.012, 0.012),
        rng.uniform(2, 5),
        rng.uniform(0, 6),
        rng.uniform(0, 6),
    ]
    tops = rng.uniform(0.16, 0.36, PEAKS)
    middles = (np.linspace(0.08, 0.92, PEAKS) + rng.uniform(-0.06, 0.06, PEAKS)) * aspect
    ranges = np.stack([tops, middles, rng.uniform(0.75, 1.1, PEAKS), tops * 0.62], 1)
    lights = np.stack([rng.uniform(0, 0.6, STARS), rng.uniform(0, aspect, STARS), rng.uniform(0.002, 0.006, STARS)], 1)
    return numbers, ranges.astype(np.float32), lights.astype(np.float32)


def flags(scene: Scene) -> list[bool]:
    """The yes and no of a scene."""
    ground = scene.ground
    land, sky = LANDS[ground.land], SKIES[ground.sky]
    scenic = not ground.plain
    says = (land != "sky", land == "sea", land == "desert", sky == "sunset", sky == "night", ground.mountains)
    return [scenic and bool(said) for said in says]


def objects(scene: Scene) -> list[list[float]]:
    """The objects' rows."""
    high, wide = scene.frame.canvas
    rows = [[-1.0, 0.0, 0.0, 0.0]] * MOST
    for at, thing in enumerate(scene.things):
        side = max(8, round(thing.size * min(high, wide)))
        drawing = thing.subject * len(STYLES) + scene.style
        rows[at] = [
            drawing,
            side,
            round(thing.y * high - side / 2) + side / 2,
            round(thing.x * wide - side / 2) + side / 2,
        ]
    return rows


def tabulate(scenes: list[Scene]) -> Table:
    """Scenes of one size as a table."""
    frames, grounds = [scene.frame for scene in scenes], [scene.ground for scene in scenes]
    lands, skies = [LANDS[ground.land] for ground in grounds], [SKIES[ground.sky] for ground in grounds]
    drawn = [lots(ground, f.canvas[1] / f.canvas[0]) for ground, f in zip(grounds, frames, strict=True)]
    plain = [BACKGROUNDS[COLOURS[g.colour]] if g.plain else (-255, -255, -255) for g in grounds]

    def floats(rows: object, scale: float = 1.0) -> Floats:
        return np.asarray(rows, np.float32) / np.float32(scale)

    return Table(
        frames[0].height,
        frames[0].width,
        floats([(f.top, f.left, *f.canvas, f.sharp) for f in frames]),
        floats(plain, 255),
        floats([SKY_COLOURS[sky] for sky in skies], 255),
        floats([LAND_COLOURS[land] for land in lands], 255),
        floats([LIGHT[sky] for sky in skies]),
        floats([flags(scene) for scene in scenes]),
        floats([numbers for numbers, _, _ in drawn]),
        np.stack([ranges for _, ranges, _ in drawn]),
        np.stack([lights for _, _, lights in drawn]),
        floats([objects(scene) for scene in scenes]),
    )
