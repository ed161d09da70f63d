"""Teach the second edition's base two looks as LoRAs, pixel art and line art, on whole scenes.

Pictures are those that the base learned, redrawn; the frozen base with low-rank factors learns the noise on them. Knows
how scenes are redrawn; scenes, clock and checkpoints are ``learn``'s, factors ``few_steps``'.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from training.adapter_files import CARDS
from training.second import learn, machine
from training.second.art import Art
from training.second.course import COURSES, Course
from training.second.few_steps import FactorRun, Student
from training.second.learn import Given
from training.second.places import SECOND
from training.second.render import backdrops, render
from training.second.tables import Table
from training.team import Team

CELLS = 32  # squares across the shorter side: at 512 px a square is 16 px, two latents
SHADES = 6  # of each channel
STRONGER = 1.25  # colours, away from grey
OUTLINE = (36, 28, 44)
SOLID = 0.43  # the least share of a square that an object covers
SEEN = 0.06  # the difference from the backdrop, of 2, from which on a pixel is an object's
LINE = 24  # the shorter side in widths of a line
GREYS = 5


def covered(pictures: Tensor, behind: Tensor) -> Tensor:
    """Where there are objects (n, 1, height, width): 0 or 1."""
    return ((pictures - behind).abs().amax(1, keepdim=True) > SEEN).float()


def grown(mask: Tensor, reach: int) -> Tensor:
    """A mask and what is within reach of it."""
    return F.max_pool2d(mask, 2 * reach + 1, 1, reach)


def pixel_art(pictures: Tensor, behind: Tensor) -> Tensor:
    """Squares of one colour each, few and strong colours, and a dark outline around objects."""
    high, wide = pictures.shape[2:]
    cell = max(1, min(high, wide) // CELLS)
    mask = (F.avg_pool2d(covered(pictures, behind), cell) > SOLID).float()
    small = F.avg_pool2d(pictures, cell)
    grey = small.mean(1, keepdim=True)
    strong = (grey + STRONGER * (small - grey)).clamp(-1, 1)
    few = ((strong + 1) / 2 * (SHADES - 1)).round() / (SHADES - 1) * 2 - 1
    cross = mask.new_tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    line = (F.conv2d(mask, cross, padding=1) > 0) & (mask == 0)
    outline = torch.tensor(OUTLINE, dtype=few.dtype, device=few.device)[None, :, None, None] / 127.5 - 1
    return F.interpolate(torch.where(line, outline, few), size=(high, wide), mode="nearest")


def line_art(pictures: Tensor, behind: Tensor) -> Tensor:
    """A black contour around a few greys, on white; what is behind is left out."""
    mask = covered(pictures, behind)
    width = max(1, min(pictures.shape[2:]) // (2 * LINE))
    light = (pictures * torch.tensor([0.299, 0.587, 0.114], device=pictures.device)[None, :, None, None]).sum(1)
    greys = ((light[:, None] + 1) / 2 * (GREYS - 1)).round() / (GREYS - 1) * 2 - 1
    drawn = torch.where(mask > 0, greys, torch.where(grown(mask, width) > 0, -1.0, 1.0))
    return drawn.expand(-1, 3, -1, -1)


LOOKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pixel-art": pixel_art, "line-art": line_art}


class LookRun(FactorRun):
    """A training run of one look's factors."""

    @property
    def look(self) -> str:
        """The course's name after its base's: which of ``LOOKS``."""
        return self.course.name.removeprefix(f"{self.course.base}-")

    def beginner(self) -> Student:
        """The base course's averaged weights, with factors."""
        return Student(learn.painter(COURSES[self.course.base], self.folder))

    def paint(self, table: Table, drawings: Art) -> Tensor:
        """The scenes, redrawn; all of them sharp, as what differs from the backdrop is an object."""
        window = table.window.copy()
        window[:, 4] = 1.0
        table = replace(table, window=window)
        return LOOKS[self.look](render(table, drawings), backdrops(table, drawings.device) * 2 - 1)

    def text(self, given: Given, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """As the base reads."""
        with torch.no_grad():
            states, pooled = self.painter.reader(given.ids, given.ids_2)
        return states, pooled, pooled.new_zeros(())


def train(
    team: Team, course: Course, folder: Path = SECOND, seconds: float = 1e9, device: str | None = None, workers: int = 0
) -> list[float]:
    """Go on with a look."""
    run = LookRun(course, folder, team, machine.device(device), workers)
    return run.written(seconds, CARDS[run.look])


if __name__ == "__main__":
    asked = learn.options(__doc__, learn.followed_by("pixel-art"))
    asked.add_argument("look", choices=sorted(LOOKS))
    chosen: argparse.Namespace = asked.parse_args()
    learn.start(train, COURSES[f"{chosen.course}-{chosen.look}"], chosen)
