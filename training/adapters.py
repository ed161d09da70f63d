"""Train the LoRAs that ship with the built-in model: it stays as it is, and low-rank factors learn a look.

Knows how factors sit on the UNet's weights, the loss and the schedule of training, and how a run goes on after a
stop. Does not know how a look is drawn (``looks``) or what a LoRA file looks like (``adapter_files``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training import checkpoint
from training.adapter_files import CARDS, LORAS, Card, Factors, write_card, write_lora
from training.art import subject_art
from training.batches import OFFSET_NOISE, coarse_noise, timesteps
from training.captions import caption
from training.looks import LOOKS
from training.places import BUILTIN, CACHE
from training.pools import Pool, place
from training.subjects import BACKGROUNDS, CAST, CAST_STYLE, STYLES, SUBJECTS
from training.team import Team, asked_to_stop, together
from training.unet import importance, signal_shares

SEED = 11
RANK = ALPHA = 16
SIDE = 512  # pixels
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


class Student:
    """The shipped model with factors on its UNet; nothing else learns."""

    def __init__(self, folder: Path = BUILTIN) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            part.requires_grad_(False)
        self.unet = self.pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
        self.unet.set_attn_processor(AttnProcessor())
        modules = list(adapted(self.unet))
        self.factors = nn.ModuleDict({name.replace(".", "/"): LowRank(m.weight, RANK) for name, m in modules})
        for (_, module), factor in zip(modules, self.factors.values(), strict=True):
            parametrize.register_parametrization(module, "weight", factor)

    @torch.no_grad()
    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text states and pooled vectors, as a prompt's are when drawing."""
        states, _, pooled, _ = self.pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        return states, pooled

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """What the autoencoder makes of pictures (n, 3, side, side) in -1..1."""
        encoded: Tensor = self.pipeline.vae.encode(pictures).latent_dist.mean
        return encoded


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
    states, pooled = student.read(given.captions)
    states, pooled = states * given.kept[:, None, None], pooled * given.kept[:, None]
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).expand(len(pooled), -1)
    added = {"text_embeds": pooled, "time_ids": sizes}
    made = student.unet(given.noisy, given.timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
    errors = (made.float() - given.noise).square().mean((1, 2, 3))
    weighted: Tensor = (errors * weights[given.timesteps]).mean()
    return weighted


class Run:
    """One LoRA's training: factors, their average, the optimiser and the step count."""

    def __init__(self, look: str, course: Course, folder: Path) -> None:
        torch.manual_seed(SEED)
        self.card, self.course, self.folder = CARDS[look], course, folder
        self.state = folder / f"adapter-{look}.pt"
        self.student = Student()
        factors = self.student.factors
        self.average = checkpoint.Average(factors, 0.98)
        self.optimiser = torch.optim.AdamW(factors.parameters(), course.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.shares = signal_shares()
        self.weights = importance(self.shares, course.emphasis)
        self.step = 0
        done = checkpoint.load(self.state)
        if done:
            factors.load_state_dict(done["live"])
            self.average.module.load_state_dict(done["average"])
            self.optimiser.load_state_dict(done["optimiser"])
            self.step = done["step"]

    def keep(self) -> None:
        """Write everything needed to go on."""
        weights = {"live": self.student.factors.state_dict(), "average": self.average.module.state_dict()}
        checkpoint.save(self.state, weights | {"optimiser": self.optimiser.state_dict(), "step": self.step})

    def advance(self, source: Pool) -> float:
        """One step; returns its loss."""
        course, factors = self.course, self.student.factors
        for group in self.optimiser.param_groups:
            group["lr"] = course.rate * min(1.0, (self.step + 1) / 30) * (1 - self.step / course.steps)
        self.optimiser.zero_grad()
        given = batch(source, self.card, course, self.shares, self.step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.student, given, self.weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(factors.parameters(), 1.0)
        self.optimiser.step()
        self.average.update(factors, self.step)
        self.step += 1
        return loss.item()

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
    source = pool(run.student, look, folder)
    losses: list[float] = []
    began = saved = time.monotonic()
    while run.step < course.steps and not asked_to_stop() and time.monotonic() - began < seconds:
        losses.append(run.advance(source))
        if run.step % 50 == 0:
            spent = time.monotonic() - began
            print(f"{look} {run.step}/{course.steps} loss {np.mean(losses[-50:]):.4f} {spent:.0f} s", flush=True)
        if time.monotonic() - saved > 120:
            run.keep()
            saved = time.monotonic()
    run.keep()
    return run, losses


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
