"""How the drawings move: each subject has one motion, and each motion is a loop of eight poses.

Knows motions as placements of a drawing, and how to draw one. Does not know latents, noise or networks. A subject has
its own motion because the built-in text encoders know no words for motion: what moves how is told by what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.art import Pixels
from training.crops import Picture, blend

PERIOD = 8  # frames of one loop; the first is the rest pose
SCALES = (0.62, 0.80)  # of the picture's side; room to move
JITTER = 0.03
REACH = 0.14  # of the side: how far a thing moves each way
HEIGHT = 0.18  # of the side: how high it bounces
TILT = 30.0  # degrees each way
SHRINK = 0.28  # of its size, at the small end of a pulse


@dataclass(frozen=True)
class Pose:
    """Where a drawing is, against its rest: shift right and down in sides, size as a factor, turn in degrees."""

    right: float = 0.0
    down: float = 0.0
    size: float = 1.0
    turn: float = 0.0


@dataclass(frozen=True)
class Rest:
    """Where a drawing rests: size and middle, as shares of the picture's side."""

    size: float
    x: float
    y: float


def moving(share: float) -> Pose:
    """To the left, back, to the right and back."""
    return Pose(right=-REACH * math.sin(2 * math.pi * share))


def bouncing(share: float) -> Pose:
    """Up and down again, touching the ground once a loop."""
    return Pose(down=-HEIGHT * math.sin(math.pi * share))


def spinning(share: float) -> Pose:
    """Turning one way, then the other."""
    return Pose(turn=TILT * math.sin(2 * math.pi * share))


def pulsing(share: float) -> Pose:
    """Smaller and back, as a heart beats."""
    return Pose(size=1 - SHRINK * math.sin(math.pi * share) ** 2)


Motion = Callable[[float], Pose]

MOTIONS: dict[str, tuple[Motion, tuple[str, ...]]] = {
    "move": (moving, ("car", "fish")),
    "bounce": (bouncing, ("frog", "cat", "apple", "mushroom", "rocket", "ghost")),
    "spin": (spinning, ("star", "pizza", "banana", "cactus")),
    "pulse": (pulsing, ("heart", "panda", "fox", "house")),
}
"""Each motion, from the share of the loop (0..1) to a pose, and the subjects that have it."""


def motion_of(subject: str) -> Motion:
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
