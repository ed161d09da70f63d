"""A picture before it is painted: what stands where, how large, in which style, before what, and how it is framed.

Knows how scenes are drawn by lot, and which combinations are kept from training for the evaluation. Does not know
pixels (``render``) or words (``captions``).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from training.second.subjects import COLOURS, LANDS, SKIES, STYLES

CORE = 181  # the first so many of the table: what people ask for first
HELD_OUT = 12  # one in so many combinations is never trained on
NEAR = 0.008  # how far a thing may stray from its place, as a share of the shorter side
PLACES = {
    "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1),
    "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip
MIDDLE, SMALL, LARGE = (0.72, 0.76), (0.33, 0.35), (0.93, 0.95)
OFF, PAIR, TRIPLE, STANDING = (0.41, 0.43), (0.415, 0.435), (0.285, 0.295), (0.51, 0.53)
FLOOR, ASIDE, ROW = 0.92, 0.24, (0.18, 0.82)  # where things stand in a scenery; how far off the middle; three in a row


@dataclass(frozen=True)
class Thing:
    """One object on the canvas: which subject, its side, and the middle of it; both as shares of the canvas.

    ``size`` is a share of the shorter side, ``x`` and ``y`` are shares of width and height.
    """

    subject: int
    size: float
    x: float
    y: float


@dataclass(frozen=True)
class Ground:
    """What is behind: a plain colour, or (``colour`` -1) a scene of land and sky, perhaps with mountains."""

    colour: int
    land: int = 0
    sky: int = 0
    mountains: bool = False
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is one colour all over."""
        return self.colour >= 0


@dataclass(frozen=True)
class Frame:
    """The picture's size, and the canvas it is a window of; pixels.

    ``sharp`` is the size of the source relative to the canvas: below 1 the picture was enlarged.
    """

    height: int
    width: int
    top: int = 0
    left: int = 0
    canvas_height: int = 0
    canvas_width: int = 0
    sharp: float = 1.0

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the whole canvas."""
        return self.canvas_height or self.height, self.canvas_width or self.width

    @property
    def ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's six numbers: original size, crop corner, target size."""
        high, wide = self.canvas
        return round(high * self.sharp), round(wide * self.sharp), self.top, self.left, self.height, self.width


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture. ``said`` names what is out of the ordinary: a place, a size, a relation."""

    things: tuple[Thing, ...]
    style: int
    ground: Ground
    frame: Frame
    said: str = ""


def held_out(scene: Scene) -> bool:
    """Whether this combination is for evaluation: a colour of each subject in each style, some pairs and sceneries."""
    ground, names = scene.ground, sorted({thing.subject for thing in scene.things})
    if ground.plain and any((7 * name + 3 * scene.style) % len(COLOURS) == ground.colour for name in names):
        return True
    keys = [] if ground.plain else [f"{name}:{ground.land}.{ground.sky}.{int(ground.mountains)}" for name in names]
    if len(names) == 2:
        keys.append(f"{names[0]}+{names[1]}")
    return any(zlib.crc32(key.encode()) % HELD_OUT == 0 for key in keys)


def frame(rng: np.random.Generator, height: int, width: int, cropped: float = 0.12, soft: float = 0.08) -> Frame:
    """A frame of that size: now and then a window of a larger canvas, now and then enlarged from a smaller source."""
    kind = rng.random()
    if kind < cropped:
        more = rng.uniform(0, 0.5, 2)
        high, wide = (8 * round(side * (1 + extra) / 8) for side, extra in zip((height, width), more, strict=True))
        top, left = int(rng.integers(high - height + 1)), int(rng.integers(wide - width + 1))
        return Frame(height, width, top, left, high, wide)
    if kind < cropped + soft:
        return Frame(height, width, sharp=float(rng.choice((0.25, 0.375, 0.5))))
    return Frame(height, width)


def ground(rng: np.random.Generator, plain: float) -> Ground:
    """A plain colour with that probability, or a scenery."""
    if rng.random() < plain:
        return Ground(int(rng.integers(len(COLOURS))))
    seed = int(rng.integers(1 << 30))
    return Ground(-1, int(rng.integers(len(LANDS))), int(rng.integers(len(SKIES))), bool(rng.random() < 0.4), seed)


def near(rng: np.random.Generator) -> float:
    """A small stray from the place."""
    return float(rng.uniform(-NEAR, NEAR))


def one(rng: np.random.Generator, subject: int, scenic: bool) -> tuple[tuple[Thing, ...], str]:
    """A single object: in the middle, small, large, off to a side, or standing in a scenery."""
    kind = rng.random()
    if kind < 0.2:
        place = list(PLACES)[int(rng.integers(len(PLACES)))]
        across, down = PLACES[place]
        size = rng.uniform(*OFF)
        return (Thing(subject, size, 0.5 + ASIDE * across + near(rng), 0.5 + ASIDE * down + near(rng)),), place
    if kind < 0.3:
        return (Thing(subject, rng.uniform(*SMALL), 0.5 + near(rng), 0.5 + near(rng)),), "small"
    if kind < 0.36:
        return (Thing(subject, rng.uniform(*LARGE), 0.5, 0.5),), "large"
    if scenic:
        size = rng.uniform(*STANDING)
        return (Thing(subject, size, 0.5 + 2 * near(rng), FLOOR - size / 2 + near(rng)),), ""
    return (Thing(subject, rng.uniform(*MIDDLE), 0.5 + near(rng), 0.5 + near(rng)),), ""


def two(rng: np.random.Generator, first: int, second: int) -> tuple[tuple[Thing, ...], str]:
    """Two objects side by side, or the first over the second."""
    size, other = rng.uniform(*PAIR, 2)
    if rng.random() < 0.3 and first != second:
        above = Thing(first, size, 0.5 + near(rng), 0.5 - ASIDE + near(rng))
        return (above, Thing(second, other, 0.5 + near(rng), 0.5 + ASIDE + near(rng))), "over"
    left, right, level = 0.5 - ASIDE + near(rng), 0.5 + ASIDE + near(rng), 0.5 + near(rng)
    return (Thing(first, size, left, level), Thing(second, other, right, level)), "beside"


def cast_by_lot(rng: np.random.Generator, cast: int, core: float) -> int:
    """A subject: one of the core with that share, else any of those that take part."""
    among = min(CORE, cast) if core and rng.random() < core else cast
    return int(rng.integers(among))


def things(
    rng: np.random.Generator, cast: int, core: float, scenic: bool, pairs: float
) -> tuple[tuple[Thing, ...], str]:
    """The objects of a picture and what is out of the ordinary about them."""
    kind, subject = rng.random(), cast_by_lot(rng, cast, core)
    if kind < pairs:
        other = cast_by_lot(rng, cast, core) if rng.random() < 0.7 else subject
        return two(rng, subject, other)
    if kind < 1.12 * pairs:
        row = 0.5 + near(rng)
        return tuple(
            Thing(subject, rng.uniform(*TRIPLE), x + near(rng) / 2, row) for x in (ROW[0], 0.5, ROW[1])
        ), "three"
    if scenic and rng.random() < 0.08:
        return (), ""
    return one(rng, subject, scenic)


def draw(
    rng: np.random.Generator, height: int, width: int, cast: int, styles: int = len(STYLES),
    plain: float = 0.7, pairs: float = 0.2, core: float = 0.0, kept_out: bool = False,
) -> Scene:  # fmt: skip
    """A scene by lot; with ``kept_out`` one of those that training never sees, else never one of those.

    Args:
        height, width: Of the picture, pixels.
        cast: How many subjects of the table take part.
        styles: How many styles take part.
        plain: Share of plain backgrounds.
        pairs: Share of pictures with two objects; a tenth as many have three.
        core: Share of the subjects that are by lot among the table's first ``CORE``, the others among all.
    """
    while True:
        behind = ground(rng, plain)
        objects, said = things(rng, cast, core, not behind.plain, pairs)
        style = int(rng.choice(styles, p=(np.array((0.5, 0.3, 0.2))[:styles] / sum((0.5, 0.3, 0.2)[:styles]))))
        made = Scene(objects, style, behind, frame(rng, height, width), said)
        if held_out(made) == kept_out:
            return made if not kept_out else replace(made, frame=Frame(height, width))


def usual(said: str, scenic: bool) -> tuple[Thing, Thing]:
    """Where two things of a scene are on the whole, given what is said of it (subjects are left 0).

    Of three in a row these are the outer two.
    """
    low, high = 0.5 - ASIDE, 0.5 + ASIDE
    if said == "beside":
        return Thing(0, middle(PAIR), low, 0.5), Thing(0, middle(PAIR), high, 0.5)
    if said == "over":
        return Thing(0, middle(PAIR), 0.5, low), Thing(0, middle(PAIR), 0.5, high)
    if said == "three":
        return Thing(0, middle(TRIPLE), ROW[0], 0.5), Thing(0, middle(TRIPLE), ROW[1], 0.5)
    if said in PLACES:
        across, down = PLACES[said]
        spot = Thing(0, middle(OFF), 0.5 + ASIDE * across, 0.5 + ASIDE * down)
    elif said or not scenic:
        spot = Thing(0, middle({"small": SMALL, "large": LARGE}.get(said, MIDDLE)), 0.5, 0.5)
    else:
        spot = Thing(0, middle(STANDING), 0.5, FLOOR - middle(STANDING) / 2)
    return spot, spot


def middle(sizes: tuple[float, float]) -> float:
    """Of a range."""
    return sum(sizes) / 2
