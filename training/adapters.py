"""Train the LoRAs that ship with the built-in model: it stays as it is, and low-rank factors learn a look.

Knows how factors sit on the UNet's weights, the loss and the course of training. Does not know how a run goes on
(``tuning``), how a look is drawn (``looks``) or what a LoRA file looks like (``adapter_files``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.adapter_files import CARDS, LORAS, Card, Factors, write_card, write_lora
from training.art import subject_art
from training.batches import OFFSET_NOISE, coarse_noise, timesteps
from training.captions import caption
from training.looks import LOOKS
from training.places import BUILTIN, CACHE
from training.pools import Pool, place
from training.subjects import BACKGROUNDS, CAST, CAST_STYLE, STYLES, SUBJECTS
from training.team import Team, together
from training.tuning import SIDE, Frozen, Tuning

SEED = 11
RANK = ALPHA = 16
PLACES = 2  # pictures of each subject on each background
DROPPED = 0.1  # share of pictures without any text (zeros, as guidance has it): it has to have the look as well
TRIGGERED = 0.5  # share of captions that say the trigger words


@dataclass(frozen=True)
class Course:
    """How long, how fast, and where the noise is."""

    steps: int = 640
    batch: int = 4
    rate: float = 3e-3  # falls in a straight line
    noisy: float = 0.3  # see ``batches.timesteps``
    coarse: float = 0.6  # see ``batches.coarse_noise``
    emphasis: float = 1.4  # see ``unet.importance``


COURSES = {"pixel-art": Course(), "line-art": Course(steps=400)}


class LowRank(nn.Module):
    """A weight's parametrisation: ``W + up @ down``, both factors as flat matrices; at first nothing is added."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        inner = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, inner) / inner**0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use."""
        with torch.autocast("cpu", enabled=False):
            return weight + (self.up @ self.down).view(weight.shape)


def adapted(unet: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The modules that learn: everything in attention blocks and residual blocks but the time's projections."""
    for name, module in unet.named_modules():
        inside = ".attentions." in name or ".resnets." in name or ".downsamplers." in name or ".upsamplers." in name
        if inside and isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith("time_emb_proj"):
            yield name, module


class Student(Frozen):
    """The shipped model with factors on its UNet; nothing else learns."""

    def __init__(self, folder: Path = BUILTIN) -> None:
        super().__init__(folder)
        self.unet = self.pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
        self.unet.set_attn_processor(AttnProcessor())
        modules = list(adapted(self.unet))
        self.factors = nn.ModuleDict({name.replace(".", "/"): LowRank(m.weight, RANK) for name, m in modules})
        for (_, module), factor in zip(modules, self.factors.values(), strict=True):
            parametrize.register_parametrization(module, "weight", factor)


def pool(student: Student, look: str, folder: Path = CACHE) -> Pool:
    """The cast in a look, on every background; encoded once and kept on disk."""
    kept = folder / f"look-{look}-{SIDE}-{PLACES}-{SEED}.pt"
    if not kept.exists():
        rng = np.random.default_rng(SEED)
        cast = [i for i, subject in enumerate(SUBJECTS) if subject.name in CAST]
        colours = list(BACKGROUNDS.values())
        rows = [(s, STYLES.index(CAST_STYLE), g) for s in cast for g in range(len(colours)) for _ in range(PLACES)]
        latents = []
        for subject, _, ground in rows:
            art = np.asarray(subject_art()[subject])
            picture = LOOKS[look](art, SIDE, colours[ground], place(rng, SIDE))
            latents.append(student.latents(torch.from_numpy(picture)[None]).half())
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": torch.cat(latents), "shows": torch.tensor(rows)}, kept)
    state = torch.load(kept, weights_only=True)
    return Pool(state["latents"], state["shows"].numpy())


def worded(rng: np.random.Generator, shows: np.ndarray, card: Card) -> str:
    """A caption as the base model learned them, half of the time with the trigger words."""
    text = caption(rng, *(int(v) for v in shows))
    return f"{card.trigger}, {text}" if rng.random() < TRIGGERED else text


@dataclass(frozen=True)
class Batch:
    """One step's material: noisy latents, the noise to be told, timesteps, captions; ``kept`` is 0 without text."""

    noisy: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    kept: Tensor


def batch(source: Pool, card: Card, course: Course, shares: Tensor, step: int) -> Batch:
    """What the UNet sees in a step, decided by the step's number."""
    rng = np.random.default_rng((SEED, step))
    rows = rng.integers(len(source.shows), size=course.batch)
    latents = source.latents[rows].float()
    drawn = rng.standard_normal(latents.shape, np.float32)
    drawn += OFFSET_NOISE * rng.standard_normal((*latents.shape[:2], 1, 1), np.float32)
    noise = torch.from_numpy(drawn + coarse_noise(rng, latents.shape, course.coarse))
    levels = timesteps(rng, course.batch, course.noisy)
    share = shares[levels][:, None, None, None]
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    captions = [worded(rng, source.shows[row], card) for row in rows]
    kept = torch.from_numpy((rng.random(course.batch) > DROPPED).astype(np.float32))
    return Batch(noisy.contiguous(memory_format=torch.channels_last), noise, levels, captions, kept)


def loss_of(student: Student, given: Batch, weights: Tensor) -> Tensor:
    """The error of the noise estimate, weighed by the noise level (``weights`` has one for each timestep)."""
    states, added = student.told(given.captions, given.kept)
    made = student.unet(given.noisy, given.timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
    errors = (made.float() - given.noise).square().mean((1, 2, 3))
    weighted: Tensor = (errors * weights[given.timesteps]).mean()
    return weighted


class Run(Tuning[Pool, Batch]):
    """One LoRA's training."""

    def __init__(self, look: str, course: Course, folder: Path) -> None:
        torch.manual_seed(SEED)
        self.card, self.course, self.student = CARDS[look], course, Student()
        super().__init__(course, folder / f"adapter-{look}.pt", self.student.factors)

    def batch(self, source: Pool) -> Batch:
        """Pictures of the pool, noised."""
        return batch(source, self.card, self.course, self.shares, self.step)

    def loss(self, given: Batch) -> Tensor:
        """The error of the noise estimate."""
        return loss_of(self.student, given, self.weights)

    def learned(self) -> Factors:
        """The averaged factors of every module: ``down`` (rank, in, *kernel) and ``up`` (out, rank, *1)."""
        found: Factors = {}
        averaged = dict(self.average.module.named_parameters())
        for name, module in adapted(self.student.unet):
            down, up = (averaged[f"{name.replace('.', '/')}.{part}"] for part in ("down", "up"))
            shape = module.weight.shape
            found[name] = down.view(RANK, *shape[1:]), up.view(*up.shape, *(1 for _ in shape[2:]))
        return found


def train(look: str, course: Course, folder: Path = CACHE, seconds: float = 1e9) -> tuple[Run, list[float]]:
    """Train to the end of the course or until the time is spent; every two minutes the state is saved."""
    torch.set_flush_denormal(True)
    run = Run(look, course, folder)
    return run, run.go_on(pool(run.student, look, folder), look, seconds, told_every=50)


def work(team: Team, looks: tuple[str, ...], seconds: float, target: Path) -> None:
    """One process's LoRA, from the drawings to the file."""
    look = looks[team.rank]
    run, _ = train(look, COURSES[look], seconds=seconds)
    size = write_lora(target / f"{look}.safetensors", run.learned(), CARDS[look], ALPHA, run.step)
    print(f"{look}: {size / 1e6:.1f} MB after {run.step} steps", flush=True)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("looks", nargs="*", help=f"any of {', '.join(LOOKS)}; all by default, a process for each")
    asked.add_argument("--seconds", type=float, default=1e9)
    asked.add_argument("--target", type=Path, default=LORAS)
    chosen = asked.parse_args()
    wanted = tuple(chosen.looks) or tuple(LOOKS)
    if unknown := set(wanted) - LOOKS.keys():
        asked.error(f"no such look: {', '.join(sorted(unknown))}")
    together(len(wanted), work, wanted, chosen.seconds, chosen.target)
    write_card(chosen.target, RANK)
