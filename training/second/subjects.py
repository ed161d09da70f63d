"""What the second edition can draw: subjects, styles, plain colours, and the parts of a scene.

Knows names and colours; the table of subjects is ``subjects.tsv``, the most asked for first, so that a course may take
the first so many. Does not know how a caption is worded or a picture is made.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from training.subjects import BACKGROUNDS

TABLE = Path(__file__).with_name("subjects.tsv")
COLOURS = tuple(BACKGROUNDS)
STYLES: tuple[str, ...] = ("3d", "flat", "mono")
"""``3d`` (soft gradients) is what a prompt without a style word means; ``mono`` is the flat drawing in greys."""
LANDS: tuple[str, ...] = ("sky", "desert", "meadow", "sea", "snow")
"""What lies below the horizon; ``sky`` is none, sky all the way down."""
SKIES: tuple[str, ...] = ("day", "sunset", "night")
IRREGULAR = {"mouse": "mice", "fish": "fish", "sheep": "sheep", "die": "dice", "christmas tree": "christmas trees"}


@dataclass(frozen=True)
class Subject:
    """One thing with pictures: its name, the emoji that shows it, other words, its natural colour."""

    name: str
    code: str
    synonyms: tuple[str, ...]
    colour: str

    @property
    def plural(self) -> str:
        """More than one of it; empty where the name is a plural already."""
        if self.name in IRREGULAR:
            return IRREGULAR[self.name]
        if self.name.endswith("ss") or self.name.endswith(("x", "ch", "sh")):
            return f"{self.name}es"
        if self.name.endswith("s"):
            return ""
        return f"{self.name[:-1]}ies" if self.name.endswith("y") and self.name[-2] not in "aeiou" else f"{self.name}s"


@cache
def subjects() -> tuple[Subject, ...]:
    """The whole table, in order."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return tuple(
        Subject(
            row["name"],
            row["code"],
            tuple(word for word in (row["synonyms"] or "").split(",") if word),
            row["colour"] or "",
        )
        for row in rows
    )
