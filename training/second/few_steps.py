"""Distil a LoRA that draws in 4 to 8 steps: latent consistency (Luo et al. 2023, arXiv:2310.04378, 2311.05556).

The teacher is the course's base model with guidance; the student is the same weights with low-rank factors, and learns
to give from any point of the teacher's path what it gives from the next point on. Used with the ``lcm`` sampler and no
guidance. Knows this loss and how factors sit on a UNet; scenes, clock and checkpoints are ``learn``'s.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.adapter_files import Card, Factors, write_lora
from training.adapters import ALPHA, RANK, LowRank, adapted
from training.second import learn, machine
from training.second.course import COURSES, Course, Stage
from training.second.learn import Given, Painter, Run
from training.second.places import SECOND
from training.second.plans import Plan
from training.second.reservoir import Reservoir
from training.team import Team

POINTS = 50  # of the teacher's path
GUIDANCE = 4.0
SKIP, SCALE = 0.5, 10.0  # of the boundary condition: at no noise the student answers with what it was given
HUBER = 1e-3
CARD = Card(
    "Impasto few steps",
    "few steps",
    "Pictures in 4 to 8 steps with the lcm sampler at guidance scale 1; it changes no style.",
)


class Student(Painter):
    """The base model with factors on its UNet; only they learn, and only they are saved."""

    def __init__(self, base: Painter) -> None:
        nn.Module.__init__(self)
        self.unet, self.reader = base.unet.requires_grad_(False), base.reader.requires_grad_(False)
        modules = list(adapted(self.unet))
        self.factors = nn.ModuleDict({name.replace(".", "/"): LowRank(m.weight, RANK) for name, m in modules})
        for (_, module), factor in zip(modules, self.factors.values(), strict=True):
            parametrize.register_parametrization(module, "weight", factor)


def boundary(levels: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the given picture and of the estimate the student's answer has (n, 1, 1, 1)."""
    scaled = (SCALE * levels.float())[:, None, None, None]
    below = scaled.square() + SKIP**2
    return SKIP**2 / below, scaled / below.sqrt()


class FactorRun(Run):
    """A training run of factors on a frozen base."""

    painter: Student

    def groups(self) -> list[dict[str, object]]:
        """The factors alone."""
        return [{"params": list(self.painter.factors.parameters()), "pace": 1.0}]

    def written(self, seconds: float, card: Card) -> list[float]:
        """Go on for so long, and write the factors as a LoRA file beside the state; returns the losses."""
        losses = learn.carry_on(self, seconds)
        if self.team.rank == 0:
            learned = factors_of(self.painter, self.average.module)
            write_lora(self.folder / f"{self.course.name}.safetensors", learned, card, ALPHA, self.step)
        return losses


class Distillation(FactorRun):
    """A training run of the few-step factors; the teacher is kept apart."""

    def beginner(self) -> Student:
        """The base course's averaged weights, twice: one to learn on, one to learn from."""
        base = COURSES[self.course.base]
        self.teacher = learn.painter(base, self.folder).to(self.device)
        machine.suit(self.teacher.unet, self.device)
        return Student(learn.painter(base, self.folder))

    def picture(self, made: Tensor, noisy: Tensor, levels: Tensor) -> Tensor:
        """The picture that a noise estimate implies."""
        share = self.shares[levels][:, None, None, None]
        return (noisy - (1 - share).sqrt() * made.float()) / share.sqrt()

    def answer(self, noisy: Tensor, levels: Tensor, text: tuple[Tensor, Tensor], sizes: Tensor) -> Tensor:
        """The student's estimate of the path's end."""
        skip, out = boundary(levels)
        made = self.model(noisy, levels, *text, sizes)
        return skip * noisy + out * self.picture(made, noisy, levels)

    @torch.no_grad()
    def next_point(self, given: Given, after: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Where the guided teacher goes from here in one DDIM step."""
        states, pooled = (torch.cat([torch.zeros_like(part), part]) for part in text)
        twice = (torch.cat([part, part]) for part in (given.noisy, given.levels))
        none, said = self.teacher(*twice, states, pooled, given.sizes.repeat(2, 1)).float().chunk(2)
        noise = none + GUIDANCE * (said - none)
        share = self.shares[after][:, None, None, None]
        ahead: Tensor = share.sqrt() * self.picture(noise, given.noisy, given.levels) + (1 - share).sqrt() * noise
        return ahead

    def given(self, plan: Plan, store: Reservoir, stage: Stage) -> Given:
        """Noise levels on the points of the path."""
        step = 1000 // POINTS
        plan.timesteps.div_(step, rounding_mode="floor").mul_(step).add_(step - 1)
        return super().given(plan, store, stage)

    def loss_of(self, given: Given, stage: Stage) -> Tensor:
        """The distance between the answers at two neighbouring points, the later one's taken as given."""
        with torch.no_grad():
            text = self.painter.reader(given.ids, given.ids_2)
            after = (given.levels - 1000 // POINTS).clamp(min=0)
            ahead = self.next_point(given, after, text)
            wanted = self.answer(ahead, after, text, given.sizes)
        error = self.answer(given.noisy, given.levels, text, given.sizes) - wanted
        distance: Tensor = ((error.square() + HUBER**2).sqrt() - HUBER).mean()
        return distance


def factors_of(student: Student, averaged: nn.Module) -> Factors:
    """The averaged factors of every module: ``down`` (rank, in, *kernel) and ``up`` (out, rank, *1)."""
    found: Factors = {}
    for name, module in adapted(student.unet):
        factor = averaged.get_submodule(f"factors.{name.replace('.', '/')}")
        down, up = (getattr(factor, part).detach().cpu() for part in ("down", "up"))
        shape = module.weight.shape
        found[name] = down.view(RANK, *shape[1:]), up.view(*up.shape, *(1 for _ in shape[2:]))
    return found


def train(
    team: Team, course: Course, folder: Path = SECOND, seconds: float = 1e9, device: str | None = None, workers: int = 0
) -> list[float]:
    """Go on with a distillation."""
    return Distillation(course, folder, team, machine.device(device), workers).written(seconds, CARD)


if __name__ == "__main__":
    learn.based_on("few-steps", train, __doc__)
