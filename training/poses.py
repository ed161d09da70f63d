"""How the drawings move: each subject has one motion, and each motion is a loop of eight poses.

Knows which subject has which of the library's motions, and how to draw a pose. Does not know latents, noise or
networks. A subject has its own motion because the built-in text encoders know no words for motion: what moves how is
told by what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from impasto.animate.motions import Loop, Pose, bouncing, moving, pulsing, spinning
from training.art import Pixels
from training.crops import Picture, blend

PERIOD = 8  # frames of one loop; the first is the rest pose
SCALES = (0.62, 0.80)  # of the picture's side; room to move
JITTER = 0.03


@dataclass(frozen=True)
class Rest:
    """Where a drawing rests: size and middle, as shares of the picture's side."""

    size: float
    x: float
    y: float


MOTIONS: dict[str, tuple[Loop, tuple[str, ...]]] = {
    "move": (moving, ("car", "fish")),
    "bounce": (bouncing, ("frog", "cat", "apple", "mushroom", "rocket", "ghost")),
    "spin": (spinning, ("star", "pizza", "banana", "cactus")),
    "pulse": (pulsing, ("heart", "panda", "fox", "house")),
}
"""Each motion, from the share of the loop (0..1) to a pose, and the subjects that have it."""


def motion_of(subject: str) -> Loop:
    """The motion that a subject has."""
    return next(motion for motion, subjects in MOTIONS.values() if subject in subjects)


def pose(subject: str, frame: int) -> Pose:
    """The pose of a subject in a frame."""
    moved = motion_of(subject)((frame % PERIOD) / PERIOD)
    return Pose(*(round(value, 6) for value in (moved.right, moved.down, moved.size, moved.turn)))


def rest(rng: np.random.Generator) -> Rest:
    """A size and a place near the middle."""
    x, y = (0.5 + rng.uniform(-JITTER, JITTER) for _ in range(2))
    return Rest(float(rng.uniform(*SCALES)), x, y)


def posed(art: Pixels, side: int, colour: tuple[int, int, int], at: Rest, moved: Pose) -> Picture:
    """A drawing on one colour, in a pose; what leaves the picture is cut off.

    Args:
        art: (height, width, 4), square.
        side: Pixels of the square picture.
        colour: Background, 0..255.
        at: Its rest.
        moved: Its pose.

    Returns:
        (3, side, side), -1..1.
    """
    grown = art.shape[0] / (side * at.size * moved.size)  # drawing's pixels for each of the picture's
    angle = math.radians(moved.turn)
    cos, sin = math.cos(angle) * grown, math.sin(angle) * grown
    x, y = side * (at.x + moved.right), side * (at.y + moved.down)
    middle = art.shape[0] / 2
    back = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    placed = (
        Image.fromarray(art)
        .convert("RGBa")
        .transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    )
    return blend(np.asarray(placed.convert("RGBA")), np.asarray(colour, np.float32))
