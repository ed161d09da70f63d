"""Train the built-in motion adapter: the built-in UNet stays as it is, and layers between the frames learn to move.

Knows how a video is noised, the loss and the course of training. Does not know how a run goes on (``tuning``), how
things move (``poses``) or what the adapter's files look like (``motion_files``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import MotionAdapter
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from numpy.typing import NDArray
from torch import Tensor, nn

from impasto.animate.motions import Pose
from impasto.models.motion import motion_layers, with_motion
from training.art import subject_art
from training.captions import caption
from training.motion_files import MOTION, write_adapter
from training.places import BUILTIN, CACHE
from training.poses import PERIOD, pose, posed, rest
from training.subjects import BACKGROUNDS, CAST, CAST_STYLE, STYLES, SUBJECTS
from training.team import Team, together
from training.tuning import SIDE, Frozen, Tuning

SEED = 13
GROUNDS = 6  # backgrounds of each subject, each with a place of its own
FRAMES = 32  # the most that the adapter can tell apart
HEADS = 4
SHARED = 0.5  # of the noise's variance: the same in every frame; ``impasto.animate`` starts likewise
DROPPED = 0.15  # share of videos without any text (zeros, as guidance has it)
STATE = CACHE / "motion.pt"


@dataclass(frozen=True)
class Stage:
    """Part of the course: how many steps, and how many videos of how many frames each of them has."""

    steps: int
    videos: int
    frames: int


@dataclass(frozen=True)
class Course:
    """How long, how fast, and where the noise is."""

    stages: tuple[Stage, ...] = (Stage(850, 2, 4), Stage(200, 1, 10))
    rate: float = 2e-3  # falls in a straight line
    emphasis: float = 2.0  # see ``unet.importance``
    lowest: int = 600  # timestep of the least strength that is practised

    @property
    def steps(self) -> int:
        """The whole course."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


def new_adapter(widths: tuple[int, ...]) -> MotionAdapter:
    """An adapter that fits a UNet of such levels and changes nothing yet."""
    made = MotionAdapter(
        block_out_channels=widths,
        motion_layers_per_block=2,
        motion_num_attention_heads=HEADS,
        motion_norm_num_groups=8,
        motion_max_seq_length=FRAMES,
    )
    for name, module in made.named_modules():
        if name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return made


class Student(Frozen):
    """The shipped model with layers between the frames; nothing else learns."""

    def __init__(self, folder: Path = BUILTIN) -> None:
        super().__init__(folder)
        self.adapter = new_adapter(tuple(self.pipeline.unet.config.block_out_channels))
        self.unet = with_motion(self.pipeline.unet, self.adapter)
        self.unet.set_attn_processor(AttnProcessor())  # plain attention: its backward pass is the faster one on a CPU
        self.layers = nn.ModuleDict(
            {name.replace(".", "/"): layers for name, layers in motion_layers(self.unet).items()}
        )
        self.layers.requires_grad_(True)
        self.clocks = [m for m in self.unet.modules() if isinstance(m, SinusoidalPositionalEmbedding)]
        self.times = [clock.pe for clock in self.clocks]

    def tell(self, frames: NDArray[np.int64]) -> None:
        """Let the layers take the given frames of the video for what they see, in place of the first so many."""
        for clock, times in zip(self.clocks, self.times, strict=True):
            clock.pe = times[:, frames]


@dataclass(frozen=True)
class Loops:
    """Latents (n, period, 4, side, side) of one loop each, and the subject, style and background they show."""

    latents: Tensor
    shows: NDArray[np.int64]


def drawn_loops(student: Student) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """Every subject of the cast on some backgrounds: what it shows, and its loop's latents (period, 4, side, side)."""
    rng = np.random.default_rng(SEED)
    colours, style = list(BACKGROUNDS.values()), STYLES.index(CAST_STYLE)
    for index, subject in enumerate(SUBJECTS):
        if subject.name not in CAST:
            continue
        art = np.asarray(subject_art()[index, style])
        for ground in rng.permutation(len(colours))[:GROUNDS]:
            at = rest(rng)
            poses = [pose(subject.name, frame) for frame in range(PERIOD)]
            known: dict[Pose, Tensor] = {}  # several frames of a loop look alike
            for moved in poses:
                if moved not in known:
                    picture = posed(art, SIDE, colours[ground], at, moved)
                    known[moved] = student.latents(torch.from_numpy(picture)[None])[0].half()
            yield (index, style, int(ground)), torch.stack([known[moved] for moved in poses])


def loops(student: Student, folder: Path = CACHE) -> Loops:
    """All loops, encoded once and kept on disk."""
    kept = folder / f"motion-{SIDE}-{GROUNDS}-{SEED}.pt"
    if not kept.exists():
        shows, latents = zip(*drawn_loops(student), strict=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": torch.stack(latents), "shows": torch.tensor(shows)}, kept)
    state = torch.load(kept, weights_only=True)
    return Loops(state["latents"], state["shows"].numpy())


@dataclass(frozen=True)
class Batch:
    """One step's material: noisy videos, what is to be told of them, timesteps, captions; ``kept`` is 0 without text.

    ``noisy`` and ``told`` are (videos, 4, frames, side, side); ``frames`` says which frames of the video they are.
    """

    noisy: Tensor
    told: Tensor
    timesteps: Tensor
    captions: list[str]
    kept: Tensor
    frames: NDArray[np.int64]


def some_frames(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """The first frame and others: half of the time of the first loop (or two), else of the longest video."""
    last = FRAMES if rng.random() < 0.5 else max(PERIOD, 16 if count > PERIOD else PERIOD)
    others = np.sort(rng.permutation(np.arange(1, last))[: count - 1])
    return np.concatenate([[0], others])


def noised(start: Tensor, target: Tensor, noise: Tensor, sigma: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    """A video on its straight way from the noised start picture to itself, and the noise estimate that leads there.

    Drawing begins with the start picture in every frame, under noise of level ``begin``; so the noisy video at a lower
    level is ``target + sigma / begin * (start - target) + sigma * noise``, and the estimate that Euler's steps follow
    to the target is ``noise + (start - target) / begin``. Source: the interpolation of rectified flow (Liu et al. 2022,
    arXiv:2209.03003), with the start picture in noise as its source.

    Args:
        start: (videos, 1, 4, side, side); target and noise: (videos, frames, 4, side, side).
        sigma: Noise level, and ``begin`` the one where drawing began: (videos,).

    Returns:
        The noisy video at unit variance and the estimate, both shaped as ``target``.
    """
    sigma, begin = (level[:, None, None, None, None] for level in (sigma, begin))
    told = noise + (start - target) / begin
    return (target + sigma * told) / (1 + sigma**2).sqrt(), told


def levels(rng: np.random.Generator, count: int, lowest: int) -> tuple[Tensor, Tensor]:
    """Timesteps, and those where drawing began: the noisier ones more often, the very first above all."""
    begin = rng.uniform(lowest, 1000, count)
    share = np.where(rng.random(count) < 0.2, 1.0, np.sqrt(rng.random(count)))
    return torch.from_numpy((begin * share).astype(np.int64)), torch.from_numpy(begin.astype(np.int64))


def batch(source: Loops, course: Course, shares: Tensor, step: int) -> Batch:
    """What the UNet sees in a step, decided by the step's number."""
    rng = np.random.default_rng((SEED, step))
    stage = course.at(step)
    rows = rng.integers(len(source.shows), size=stage.videos)
    frames = some_frames(rng, stage.frames)
    target = source.latents[rows][:, frames % PERIOD].float()
    own = rng.standard_normal(target.shape, np.float32)
    same = rng.standard_normal((stage.videos, 1, *target.shape[2:]), np.float32)
    noise = torch.from_numpy((1 - SHARED) ** 0.5 * own + SHARED**0.5 * same)
    now, begin = levels(rng, stage.videos, course.lowest)
    sigma = ((1 - shares) / shares) ** 0.5
    noisy, told = noised(target[:, :1], target, noise, sigma[now], sigma[begin])
    captions = [caption(rng, *(int(v) for v in source.shows[row])) for row in rows]
    kept = torch.from_numpy((rng.random(stage.videos) > DROPPED).astype(np.float32))
    return Batch(noisy.transpose(1, 2), told.transpose(1, 2), now, captions, kept, frames)


def loss_of(student: Student, given: Batch, weights: Tensor) -> Tensor:
    """The error of the estimate, weighed by the noise level (``weights`` has one for each timestep)."""
    states, added = student.told(given.captions, given.kept)
    states = states.repeat_interleave(len(given.frames), 0)
    student.tell(given.frames)
    made = student.unet(given.noisy, given.timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
    errors = (made.float() - given.told).square().mean((1, 2, 3, 4))
    weighted: Tensor = (errors * weights[given.timesteps]).mean()
    return weighted


class Run(Tuning[Loops, Batch]):
    """The adapter's training."""

    def __init__(self, course: Course, state: Path) -> None:
        torch.manual_seed(SEED)
        self.course, self.student = course, Student()
        super().__init__(course, state, self.student.layers)

    def batch(self, source: Loops) -> Batch:
        """Videos of the loops, noised."""
        return batch(source, self.course, self.shares, self.step)

    def loss(self, given: Batch) -> Tensor:
        """The error of the estimate."""
        return loss_of(self.student, given, self.weights)

    def keep(self) -> None:
        """Write everything needed to go on, with the frames' times in their own order."""
        self.student.tell(np.arange(FRAMES))
        super().keep()

    def learned(self) -> dict[str, Tensor]:
        """The averaged layers under the names that an adapter's file has."""
        state: dict[str, Any] = self.average.module.state_dict()
        return {name.replace("/", "."): tensor for name, tensor in state.items()}


def train(course: Course, state: Path = STATE, folder: Path = CACHE, seconds: float = 1e9) -> tuple[Run, list[float]]:
    """Train to the end of the course or until the time is spent; every two minutes the state is saved."""
    torch.set_flush_denormal(True)
    run = Run(course, state)
    return run, run.go_on(loops(run.student, folder), "motion", seconds, told_every=20)


def work(_team: Team, seconds: float, target: Path) -> None:
    """The process that trains: from the drawings to the adapter's files."""
    run, _ = train(Course(), seconds=seconds)
    size = write_adapter(target, run.learned(), run.student.adapter.config, run.step)
    print(f"motion: {size / 1e6:.1f} MB after {run.step} steps", flush=True)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seconds", type=float, default=1e9)
    asked.add_argument("--target", type=Path, default=MOTION)
    chosen = asked.parse_args()
    together(1, work, chosen.seconds, chosen.target)
