"""Train the refiner: an expert for the last, least noisy steps, as SDXL has one.

It reads the second text encoder alone (the base's, frozen) and the aesthetic score in place of the target size. Half
of its pictures are worn (blurred, or with blotches of wrong colour, the more the noisier), as those that a base model
hands on are, and the noise it is to tell is the one that leads from there to the clean picture. A low score is learned
from pictures that stay blurred. Knows all this; how a run goes on is ``learn``'s.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from training import architecture, checkpoint
from training.second import learn, machine
from training.second.course import COURSES, Course, Stage
from training.second.learn import Given, Painter, Run, drawn_noise, noised
from training.second.places import SECOND
from training.second.plans import Plan
from training.second.reading import Reader
from training.second.reservoir import Reservoir
from training.team import Team
from training.unet import importance

GOOD, POOR, POORLY = (6.0, 7.5), (2.0, 3.0), 0.15  # scores of clean and of blurred pictures, and the latter's share
WORN = 0.5  # share of pictures that come in worn
BLOTCHES = 0.25  # the most that a blotch adds, in deviations of the latents


def network(widths: tuple[int, ...]) -> UNet2DConditionModel:
    """The base's UNet, but for what it is conditioned on: one text encoder, and five numbers instead of six."""
    config, text = dict(architecture.unet(widths).config), architecture.WIDER[1]
    changed = {"cross_attention_dim": text, "projection_class_embeddings_input_dim": 5 * architecture.TIME_DIM + text}
    made: UNet2DConditionModel = UNet2DConditionModel.from_config(config | changed)
    return made


def converted(base: UNet2DConditionModel, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A base's weights in a refiner's shapes: what reads the first encoder, or two of the six numbers, is left out.

    Both lie at known ends: the first encoder's numbers before the second's, the pooled vector before the sizes'.
    """
    found = {}
    for name, weight in base.state_dict().items():
        inputs = wanted[name].shape[1:]
        if weight.shape[1:] == inputs:
            found[name] = weight
        elif name.startswith("add_embedding"):
            kept = inputs[0] - architecture.TIME_DIM  # the score's begin at nothing
            found[name] = F.pad(weight[:, :kept], (0, architecture.TIME_DIM))
        else:
            found[name] = weight[:, weight.shape[1] - inputs[0] :]
    return found


class Refiner(Painter):
    """The refiner's UNet, and the base's text encoders, which do not learn."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        nn.Module.__init__(self)
        self.unet = network(widths)
        self.reader = Reader()


def blurred(latents: Tensor) -> Tensor:
    """Half the resolution, enlarged again."""
    small = F.avg_pool2d(latents, 2)
    return F.interpolate(small, size=latents.shape[2:], mode="bilinear")


def worn(latents: Tensor, seed: int, share: Tensor) -> Tensor:
    """Pictures as a base model may leave them: blurred and blotched, the more, the more noise is on them.

    ``share`` is that of alpha-bar; at deviation 1 of the noise the wear may be whole.
    """
    dice = torch.Generator(latents.device).manual_seed(seed)
    most = ((1 - share) / share).sqrt().clamp(max=1)[:, None, None, None]
    count, chance = len(latents), torch.rand(3, len(latents), 1, 1, 1, generator=dice, device=latents.device)
    much = most * chance[0] * (chance[1] < WORN)
    blotches = drawn_noise((count, 4, *latents.shape[2:]), 1.0, seed, latents.device)
    blotches = F.interpolate(F.avg_pool2d(blotches, 4), size=latents.shape[2:], mode="bilinear")
    return latents + much * (blurred(latents) - latents) + BLOTCHES * much * chance[2] * blotches


class RefinerRun(Run):
    """A training run of the refiner."""

    painter: Refiner

    def beginner(self) -> Refiner:
        """The base course's averaged weights, UNet and text encoders."""
        made, base = Refiner(self.course.widths), learn.painter(COURSES[self.course.base], self.folder)
        made.unet.load_state_dict(converted(base.unet, made.unet.state_dict()))
        made.reader.load_state_dict(base.reader.state_dict())
        made.reader.requires_grad_(False)
        return made

    def groups(self) -> list[dict[str, object]]:
        """The UNet alone."""
        return [{"params": list(self.painter.unet.parameters()), "pace": 1.0}]

    def given(self, plan: Plan, store: Reservoir, stage: Stage) -> Given:
        """Worn pictures under noise; the noise to be told leads to clean ones, or to blurred ones at a low score."""
        latents, levels = store.at(plan.places), plan.timesteps.to(self.device)
        dice = torch.Generator().manual_seed(self.seed)
        poor = (torch.rand(len(latents), generator=dice) < POORLY).to(self.device)
        chance = torch.rand(len(latents), generator=dice).to(self.device)
        score = torch.where(poor, POOR[0] + chance * (POOR[1] - POOR[0]), GOOD[0] + chance * (GOOD[1] - GOOD[0]))
        wanted = torch.where(poor[:, None, None, None], blurred(latents), latents)
        share = self.shares[levels]
        noise = drawn_noise(tuple(latents.shape), 0.0, self.seed, self.device)
        noisy = noised(worn(wanted, self.seed + learn.APART, share), noise, share)
        column = share[:, None, None, None]
        led = (noisy - column.sqrt() * wanted) / (1 - column).sqrt()
        sizes = torch.from_numpy(plan.sizes).to(self.device)
        five = torch.cat([sizes[:, :4], score[:, None]], 1)
        kept = torch.from_numpy(plan.kept).to(self.device)
        ids, ids_2, meant = (tensor.to(self.device) for tensor in (plan.ids, plan.ids_2, plan.meant))
        return Given(noisy, led, levels, ids, ids_2, kept, five, meant)

    def loss_of(self, given: Given, stage: Stage) -> Tensor:
        """The weighted error of the noise estimate, with the second encoder's text alone."""
        with torch.no_grad():
            states, pooled = self.painter.reader(given.ids, given.ids_2)
        states = states[..., architecture.WIDER[0] :] * given.kept[:, None, None]
        made = self.model(given.noisy, given.levels, states, pooled * given.kept[:, None], given.sizes)
        errors = (made.float() - given.noise).square().mean((1, 2, 3))
        weighted: Tensor = (errors * importance(self.shares[given.levels], stage.emphasis)).mean()
        return weighted


def train(
    team: Team, course: Course, folder: Path = SECOND, seconds: float = 1e9, device: str | None = None, workers: int = 0
) -> list[float]:
    """Go on with a refiner's course; the base course's weights must be there.

    Raises:
        FileNotFoundError: They are not.
    """
    return learn.carry_on(RefinerRun(course, folder, team, machine.device(device), workers), seconds)


def refiner(course: Course, folder: Path = SECOND) -> Refiner:
    """The averaged weights of a refiner's course."""
    done = checkpoint.load(folder / f"{course.name}.pt")
    if done is None:
        raise FileNotFoundError(f"no weights of {course.name!r} in {folder}: run `python -m training.second.refiner`")
    made = Refiner(course.widths)
    made.load_state_dict(done["average"])
    made.requires_grad_(False).eval()
    return made


if __name__ == "__main__":
    learn.based_on("refiner", train, __doc__)
