"""Train the UNet and both text encoders together, from small latents to large.

Knows the noise schedule, the loss and the curriculum. Does not know how pictures or captions are made.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from training import architecture, checkpoint
from training.arithmetic import CPU, short
from training.batches import Batch, Frame, batch
from training.linear_start import start_unet
from training.places import CACHE
from training.pools import Pool, pool
from training.reading import Reader
from training.reading import trained as taught
from training.subjects import CAST, CAST_STYLE, STYLES, SUBJECTS
from training.team import Team, alone, asked_to_stop, together
from training.vae import trained

STATE = CACHE / "unet.pt"
SEED = 7
READER_PACE = 0.2


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: which sizes, how many steps of which batch, learning rate from and to."""

    name: str
    frames: tuple[Frame, ...]
    steps: int
    batch: int
    rates: tuple[float, float]
    tokens: int = 77
    noisy: float = 0.0
    short: bool = True
    emphasis: float = 1.0  # see ``importance``
    coarse: float = 0.0  # see ``batches.coarse_noise``


def square(side: int, often: float = 1.0) -> Frame:
    """A square frame in latent pixels, cut from the pool of its own size."""
    return Frame(side, side, 8 * side, often)


CURRICULUM = (
    Stage("16", (square(16),), 900, 32, (1.5e-3, 8e-4), tokens=32, noisy=0.3, short=False, emphasis=2.0),
    Stage("32", (square(32),), 350, 16, (8e-4, 6e-4), tokens=32, noisy=0.2, emphasis=1.5),
    Stage("64", (square(64),), 500, 8, (8e-4, 1e-5), tokens=32, noisy=0.6, emphasis=1.8, coarse=0.6),
)
GROUNDS = {128: 10, 256: 10, 512: 8}


class Painter(nn.Module):
    """UNet and text encoders as one module, in the compact vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = architecture.unet()
        self.unet.set_attn_processor(AttnProcessor())  # plain attention: its backward pass is the faster one on a CPU
        self.reader = Reader()

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor, sizes: Tensor) -> Tensor:
        """The noise estimate."""
        added = {"text_embeds": pooled, "time_ids": sizes}
        made: Tensor = self.unet(noisy, timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
        return made


def signal_shares() -> Tensor:
    """alpha-bar of SDXL's schedule: the share of picture left at each timestep."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def importance(share: Tensor, emphasis: float) -> Tensor:
    """Weight of the squared noise error: min-SNR-5 where little noise is left, more where composition is decided.

    At ``emphasis`` 2 the error of the noise is weighed as the error of the picture it implies; at 0, as it is.
    """
    variance = (1 - share) / share
    return (1 + variance) ** (emphasis / 2) * (5 * variance).clamp(max=1)


def loss_of(painter: Painter, given: Batch, stage: Stage, shares: Tensor) -> Tensor:
    """The weighted error of the noise estimate on one batch."""
    share = shares[given.timesteps][:, None, None, None]
    noisy = (share.sqrt() * given.latents + (1 - share).sqrt() * given.noise).contiguous(
        memory_format=torch.channels_last
    )
    states, pooled, _ = painter.reader(given.captions, stage.tokens)
    states, pooled = states * given.kept[:, None, None], pooled * given.kept[:, None]
    made = painter(noisy, given.timesteps, states, pooled, given.sizes)
    errors = (made.float() - given.noise).square().mean((1, 2, 3))
    weighted: Tensor = (errors * importance(shares[given.timesteps], stage.emphasis)).mean()
    return weighted


def where(step: int, curriculum: tuple[Stage, ...]) -> tuple[Stage, float]:
    """The stage a step belongs to and how far into it the step is (0..1)."""
    for stage in curriculum:
        if step < stage.steps:
            return stage, step / stage.steps
        step -= stage.steps
    raise IndexError("the curriculum is over")


class Run:
    """A training run: live weights, their average, the optimiser and the step count."""

    def __init__(self, state: Path, curriculum: tuple[Stage, ...], team: Team) -> None:
        torch.manual_seed(SEED)
        self.team = team
        self.state, self.curriculum = state, curriculum
        self.painter = Painter()
        start_unet(self.painter.unet)
        self.painter.unet.to(memory_format=torch.channels_last)
        self.painter.reader.load_state_dict(taught().state_dict())
        self.average = checkpoint.Average(self.painter, 0.99)
        groups = [
            {"params": list(self.painter.unet.parameters()), "pace": 1.0},
            {"params": list(self.painter.reader.parameters()), "pace": READER_PACE},
        ]
        self.optimiser = torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.shares = signal_shares()
        self.step = 0
        done = checkpoint.load(state)
        if done:
            self.painter.load_state_dict(done["live"])
            self.average.module.load_state_dict(done["average"])
            if "optimiser" in done:
                self.optimiser.load_state_dict(done["optimiser"])
            self.step = done["step"]

    def keep(self) -> None:
        """Write everything needed to go on."""
        weights = {"live": self.painter.state_dict(), "average": self.average.module.state_dict()}
        checkpoint.save(self.state, weights | {"optimiser": self.optimiser.state_dict(), "step": self.step})

    def advance(self, pools: dict[int, Pool]) -> float:
        """One step; returns its loss."""
        stage, share = where(self.step, self.curriculum)
        given = batch(
            pools,
            stage.frames,
            stage.batch // self.team.size,
            stage.noisy,
            SEED + self.team.rank,
            self.step,
            stage.coarse,
        )
        first, last = stage.rates
        warm = min(1.0, (share * stage.steps + 1) / 50)
        self.optimiser.zero_grad()
        for group in self.optimiser.param_groups:
            group["lr"] = group["pace"] * warm * (first + (last - first) * share)
        with short(CPU, stage.short):
            loss = loss_of(self.painter, given, stage, self.shares)
        torch.autograd.backward(loss)
        self.team.share_gradients(self.painter)
        torch.nn.utils.clip_grad_norm_(self.painter.parameters(), 1.0)
        self.optimiser.step()
        self.average.update(self.painter, self.step)
        self.step += 1
        return loss.item()


def gather(pools: dict[int, Pool], stage: Stage, team: Team) -> None:
    """Load the pools a stage needs; the first process builds those not on disk yet."""
    cast = {i for i, subject in enumerate(SUBJECTS) if subject.name in CAST}
    for side in sorted({frame.pool for frame in stage.frames} - pools.keys()):
        if team.rank:
            team.wait()
        pools[side] = pool(trained, side, GROUNDS[side]).only(cast, STYLES.index(CAST_STYLE))
        if team.rank == 0:
            team.wait()


def train(
    team: Team, curriculum: tuple[Stage, ...] = CURRICULUM, state: Path = STATE, seconds: float = 1e9
) -> list[float]:
    """Train to the end of the curriculum or until the time is spent; every two minutes the state is saved."""
    torch.set_flush_denormal(True)
    run = Run(state, curriculum, team)
    total = sum(stage.steps for stage in curriculum)
    pools: dict[int, Pool] = {}
    losses: list[float] = []
    began = saved = time.monotonic()
    while run.step < total and not team.any(asked_to_stop() or time.monotonic() - began > seconds):
        stage, _ = where(run.step, curriculum)
        gather(pools, stage, team)
        losses.append(run.advance(pools))
        if team.rank:
            continue
        if run.step % 100 == 0:
            recent = sum(losses[-100:]) / len(losses[-100:])
            spent = time.monotonic() - began
            print(f"unet stage {stage.name} {run.step}/{total} loss {recent:.4f} {spent:.0f} s", flush=True)
        if time.monotonic() - saved > 120:
            run.keep()
            saved = time.monotonic()
    if team.rank == 0:
        run.keep()
    return losses


def painter(state: Path = STATE) -> Painter:
    """The averaged weights of a run."""
    done = checkpoint.load(state)
    if done is None:
        raise FileNotFoundError(f"no trained UNet at {state}: run `python -m training.unet` first")
    made = Painter()
    made.load_state_dict(done["average"])
    return made.requires_grad_(False).eval()


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seconds", type=float, default=1e9)
    asked.add_argument("--processes", type=int, default=2)
    chosen = asked.parse_args()
    if chosen.processes == 1:
        train(alone(), seconds=chosen.seconds)
    else:
        together(chosen.processes, train, CURRICULUM, STATE, chosen.seconds)
