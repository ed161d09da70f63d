"""What one step needs, worked out without the device: which scenes are drawn anew, which are shown, in which words.

Everything is decided by the course, the stage and the step, so that any process can work it out beforehand: on a
machine with a GPU a few do. Knows scenes, captions and noise levels. Does not know pictures, latents or networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from training.architecture import PROMPT_TOKENS
from training.batches import DROPPED, EMPTY, timesteps
from training.second.captions import caption
from training.second.cells import UNSAID, meaning
from training.second.course import Course
from training.second.reservoir import Material, first_at
from training.second.tables import Table, tabulate
from training.second.vocabulary import vocabulary


@dataclass(frozen=True)
class Plan:
    """One step. ``kept`` is 0 where the text is dropped to zeros; ``sizes`` are SDXL's six numbers.

    ``meant`` is what each text says (n, 9), see ``cells.meaning``.
    """

    size: int
    renewed: list[int]
    fresh: Table | None
    places: Tensor
    ids: Tensor
    ids_2: Tensor
    timesteps: Tensor
    kept: NDArray[np.float32]
    sizes: NDArray[np.float32]
    meant: Tensor


def material(course: Course, stage: int, size: int, rank: int) -> Material:
    """What the reservoir of a stage's size holds; each process of a team has its own."""
    of = course.stages[stage]
    seed = 1000 * course.seed + 10 * stage + 100 * rank
    return Material(of.sizes[size].height, of.sizes[size].width, course.cast, of.plain, of.pairs, of.core, seed)


def capacity(course: Course, stage: int, team: int) -> int:
    """How many scenes one reservoir of a stage holds in each process."""
    of = course.stages[stage]
    return max(2, of.capacity // (len(of.sizes) * team))


def batch_of(course: Course, stage: int, size: int, team: int) -> int:
    """Samples of one process in one step: fewer where the size is above the stage's smallest."""
    of = course.stages[stage]
    areas = [some.height * some.width for some in of.sizes]
    return max(1, of.batch * min(areas) // (areas[size] * team))


class Plans(Dataset[Plan]):
    """The plans of a stage, by step (counted from its beginning)."""

    def __init__(self, course: Course, stage: int, rank: int = 0, team: int = 1) -> None:
        self.course, self.stage, self.rank, self.team = course, stage, rank, team

    def size_at(self, step: int) -> int:
        """Which of the stage's sizes it is; the same in all processes of a team."""
        weights = np.array([size.often for size in self.course.stages[self.stage].sizes])
        rng = np.random.default_rng((self.course.seed, self.stage, step))
        return int(rng.choice(len(weights), p=weights / weights.sum()))

    def first(self, step: int, size: int) -> int:
        """The lowest scene number in the size's reservoir at a step."""
        of = self.course.stages[self.stage]
        share = of.sizes[size].often / sum(some.often for some in of.sizes)
        return first_at(step, share * of.renewed * batch_of(self.course, self.stage, size, self.team))

    def before(self, step: int, size: int) -> int:
        """The last step before this one that had the size; this one where there was none."""
        return next((earlier for earlier in range(step - 1, -1, -1) if self.size_at(earlier) == size), step)

    def __getitem__(self, step: int) -> Plan:
        """One step's plan; its store holds all it shows if it was renewed by every plan of the size before."""
        course, size = self.course, self.size_at(step)
        of = course.stages[self.stage]
        rng = np.random.default_rng((course.seed, self.stage, step, self.rank + 1))
        held, source = capacity(course, self.stage, self.team), material(course, self.stage, size, self.rank)
        first, before = self.first(step, size), self.first(self.before(step, size), size)
        renewed = [number + held for number in range(before, first)]
        count = batch_of(course, self.stage, size, self.team)
        numbers = first + rng.integers(held, size=count)
        scenes = [source.scene(int(number)) for number in numbers]
        texts = ["" if rng.random() < EMPTY else caption(rng, scene) for scene in scenes]
        ids, ids_2 = vocabulary().encode(texts, PROMPT_TOKENS)
        return Plan(
            size,
            renewed,
            tabulate([source.scene(number) for number in renewed]) if renewed else None,
            ids.new_tensor(numbers % held),
            ids,
            ids_2,
            timesteps(rng, count, of.noisy) * of.top // 1000,
            (rng.random(count) > DROPPED).astype(np.float32),
            np.array([scene.frame.ids for scene in scenes], np.float32),
            ids.new_tensor([meaning(s) if t else UNSAID for s, t in zip(scenes, texts, strict=True)]),
        )


class Fillings(Dataset[tuple[list[int], Table]]):
    """Tables of scenes by their numbers, so many at a time: what fills a reservoir."""

    def __init__(self, shown: Material, numbers: list[int], count: int) -> None:
        self.shown, self.count = shown, count
        self.parts = [numbers[at : at + count] for at in range(0, len(numbers), count)]

    def __len__(self) -> int:
        """How many parts."""
        return len(self.parts)

    def __getitem__(self, part: int) -> tuple[list[int], Table]:
        """The numbers and the table of one part."""
        numbers = self.parts[part]
        return numbers, tabulate([self.shown.scene(number) for number in numbers])
