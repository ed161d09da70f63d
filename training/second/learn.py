"""Train the UNet and both text encoders of the second edition, on two CPU cores or one GPU, for as long as there is.

The run can be ended at any moment, by a signal or by pulling the plug: it is saved every three minutes, whole, and
the same command goes on from there. Knows the loss, the optimiser and the clock. Does not know how scenes are drawn,
painted or worded.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from impasto.models.catalog import BUILTIN_FOLDER
from training import architecture, checkpoint
from training.arithmetic import short
from training.batches import OFFSET_NOISE
from training.linear_start import start_unet
from training.second import art, autoencoder, cells, growth, machine
from training.second.course import BASES, COURSES, Course, Stage
from training.second.optimiser import MuonBesideAdamW, adamw
from training.second.places import SECOND
from training.second.plans import Fillings, Plan, Plans, capacity, material
from training.second.reading import Reader
from training.second.reading import trained as taught
from training.second.render import render
from training.second.reservoir import Reservoir, chunk
from training.second.tables import Table
from training.team import Team, alone, asked_to_stop, heed, together
from training.unet import importance, signal_shares

SAVE_EVERY = {"cpu": 180, "cuda": 60}  # seconds, by device
REPORT_EVERY = 50  # steps
TELLING = 2.0  # how much the error of what the text tells (``cells``) weighs beside the noise's
APART = 1 << 30  # between the seeds of the noise to be told and of any other of a step; torch takes 32 bits of them
WORN = 0.5  # the strongest noise on what is set down, so that the UNet learns to do with less


def network(course: Course) -> UNet2DConditionModel:
    """A course's UNet, its weights by lot; one that will be inner levels looks at one latent at a time first."""
    return architecture.unet(course.widths, architecture.WIDER, kernel=1 if course.within > 1 else 3)


class Painter(nn.Module):
    """UNet and text encoders as one module, in the compact vocabulary."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.unet = network(course)
        self.reader = Reader()

    def forward(self, noisy: Tensor, levels: Tensor, states: Tensor, pooled: Tensor, sizes: Tensor) -> Tensor:
        """The noise estimate."""
        added = {"text_embeds": pooled, "time_ids": sizes}
        made: Tensor = self.unet(noisy, levels, states, added_cond_kwargs=added, return_dict=False)[0]
        return made


@dataclass(frozen=True)
class Given:
    """A step's material on the device."""

    noisy: Tensor
    noise: Tensor
    levels: Tensor
    ids: Tensor
    ids_2: Tensor
    kept: Tensor
    sizes: Tensor
    meant: Tensor


def drawn_noise(shape: tuple[int, ...], coarse: float, seed: int, device: torch.device) -> Tensor:
    """White noise, its mean moved a little, and noise in blocks of 4 to 32 latents (see ``batches.coarse_noise``)."""
    dice = torch.Generator(device).manual_seed(seed)
    count, channels, high, wide = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(count, channels, *size, generator=dice, device=device)

    noise = normal(high, wide) + OFFSET_NOISE * normal(1, 1)
    if coarse:
        for cell in (4, 8, 16, 32):
            if cell <= min(high, wide) // 4:
                strength = coarse * torch.rand(count, 1, 1, 1, generator=dice, device=device)
                blocks = F.interpolate(normal(-(-high // cell), -(-wide // cell)), scale_factor=cell)
                noise += strength * blocks[:, :, :high, :wide]
    return noise


def noised(latents: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Pictures under noise; ``share`` (n) of alpha-bar."""
    share = share[:, None, None, None]
    return (share.sqrt() * latents + (1 - share).sqrt() * noise).contiguous(memory_format=torch.channels_last)


class Stores:
    """The reservoirs of one stage, filled when they are first needed."""

    def __init__(self, run: Run, stage: int) -> None:
        self.run, self.stage, self.plans = run, stage, Plans(run.course, stage, run.team.rank, run.team.size)
        self.by_size: dict[int, Reservoir] = {}

    def store(self, size: int, step: int) -> Reservoir:
        """The reservoir of a size, as it should be at a step."""
        run = self.run
        if size not in self.by_size:
            shown = material(run.course, self.stage, size, run.team.rank)
            held = capacity(run.course, self.stage, run.team.size)
            kept = run.folder / "stores" if run.on_cpu else None
            made = Reservoir(shown, held, run.art, run.vae, kept, run.paint, run.look)
            self.fill(made, self.plans.first(step, size))
            self.by_size[size] = made
        return self.by_size[size]

    def fill(self, made: Reservoir, first: int) -> None:
        """Paint whatever is not there yet."""
        missing, area = made.missing(first), made.material.height * made.material.width
        parts = Fillings(made.material, missing, chunk(area, self.run.device))
        began = time.monotonic()
        for done, (numbers, table) in enumerate(loader(parts, self.run.workers)):
            made.renew(numbers, table)
            if done % 100 == 99:
                print(f"{made.name}: {done + 1} of {len(parts)} parts {time.monotonic() - began:.0f} s", flush=True)
            if asked_to_stop():
                return

    def prepare(self, plan: Plan, step: int) -> Reservoir:
        """The plan's reservoir, renewed as the plan says."""
        store = self.store(plan.size, step)
        if plan.fresh is not None:
            store.renew(plan.renewed, plan.fresh)
        return store


def whole(parts: list[Any]) -> Any:
    """What a loader makes of a batch of one that is complete already."""
    return parts[0]


def loader(source: Any, workers: int, steps: range | None = None) -> DataLoader[Any]:
    """The items in order, worked out ahead in other processes where there are any."""
    ahead = {"prefetch_factor": 4} if workers else {}
    return DataLoader(source, batch_size=1, sampler=steps, num_workers=workers, collate_fn=whole, **ahead)  # type: ignore[arg-type]


class Run:
    """A training run: live weights, their average, the optimiser, and how far it is."""

    def __init__(self, course: Course, folder: Path, team: Team, device: torch.device, workers: int) -> None:
        torch.manual_seed(course.seed)
        machine.settle(device)
        self.course, self.folder, self.team, self.device, self.workers = course, folder, team, device, workers
        self.on_cpu = device.type == "cpu"
        self.state = folder / f"{course.name}.pt"
        self.art = art.load(device)
        self.vae = autoencoder.settled().to(device, memory_format=torch.channels_last)
        self.painter = self.beginner().to(device)
        machine.suit(self.painter.unet, device)
        machine.suit_readers((self.painter.reader.first, self.painter.reader.second), device)
        self.average = checkpoint.Average(self.painter, course.decay)
        self.optimiser = self.make_optimiser()
        self.shares = signal_shares().to(device)
        self.model: nn.Module = self.painter
        self.stage = self.stage_step = self.step = self.samples = 0
        self.spent = 0.0
        self.resume()

    @cached_property
    def told(self) -> cells.Told:
        """What text should tell; a run that leaves the text encoders alone never asks."""
        return cells.told(self.art, self.folder / cells.TABLE.name)

    @cached_property
    def inner(self) -> list[nn.Parameter]:
        """What the UNet has from the one that it grew around."""
        around = self.course.grown_from
        return growth.inner_part(self.painter.unet, network(COURSES[around])) if around else []

    def beginner(self) -> Painter:
        """The network before its first step."""
        made = Painter(self.course)
        if self.course.grown_from:
            inner = painter(COURSES[self.course.grown_from], self.folder)
            growth.grow(made.unet, inner.unet)
            made.reader.load_state_dict(inner.reader.state_dict())
            return made
        if self.course.warm_start:
            known, wanted = first_edition(self.folder).state_dict(), made.unet.state_dict()
            if self.course.within > 1:
                known["conv_in.weight"] = known["conv_in.weight"].sum((2, 3), keepdim=True)
            made.unet.load_state_dict({k: v for k, v in known.items() if v.shape == wanted[k].shape}, strict=False)
        else:
            start_unet(made.unet)
        if self.course.stages[0].told < 1:
            made.reader.load_state_dict(taught().state_dict())
        return made

    def make_optimiser(self) -> torch.optim.AdamW | MuonBesideAdamW:
        """AdamW, or Muon beside it where the course says so."""
        if self.course.muon:
            unet, reader = self.painter.unet.parameters(), self.painter.reader.parameters()
            return MuonBesideAdamW(unet, reader, self.course.muon, self.course.reader_pace)
        return adamw(self.groups())

    def groups(self) -> list[dict[str, Any]]:
        """What is learned, and at which share of the rate."""
        unet, reader = self.painter.unet.parameters(), self.painter.reader.parameters()
        return [{"params": list(unet), "pace": 1.0}, {"params": list(reader), "pace": self.course.reader_pace}]

    def resume(self) -> None:
        """Go on from the saved state, if there is one; weights alone are enough to start from."""
        done = checkpoint.load(self.state)
        if not done:
            return
        self.painter.load_state_dict(done["live"])
        self.average.module.load_state_dict(done["average"])
        if "optimiser" in done:
            paces = [group["pace"] for group in self.optimiser.param_groups]
            self.optimiser.load_state_dict(done["optimiser"])
            for group, pace in zip(self.optimiser.param_groups, paces, strict=True):
                group["pace"] = pace  # the course's, which may have been changed in between
        self.stage, self.stage_step, self.step = done["stage"], done["stage_step"], done["step"]
        self.samples, self.spent = done["samples"], done["spent"]

    def keep(self) -> None:
        """Write everything needed to go on."""
        weights = {"live": self.painter.state_dict(), "average": self.average.module.state_dict()}
        far = {"stage": self.stage, "stage_step": self.stage_step, "step": self.step, "samples": self.samples}
        checkpoint.save(self.state, weights | far | {"optimiser": self.optimiser.state_dict(), "spent": self.spent})

    @property
    def look(self) -> str:
        """What pictures are redrawn as, if anything."""
        return ""

    def paint(self, table: Table, drawings: art.Art) -> Tensor:
        """What the pictures look like."""
        return render(table, drawings)

    @property
    def seed(self) -> int:
        """Of this process's step."""
        return (self.course.seed * 1_000_003 + self.step) * 8 + self.team.rank

    def noise(self, shape: tuple[int, ...], coarse: float) -> Tensor:
        """The noise to be told; inner levels see the mean of that on the latents that each of theirs stands for."""
        times = self.course.within
        full = (*shape[:2], shape[2] * times, shape[3] * times)
        return F.avg_pool2d(drawn_noise(full, coarse, self.seed, self.device), times)

    def given(self, plan: Plan, store: Reservoir, stage: Stage) -> Given:
        """The plan's pictures, noised, on the device."""
        latents = store.at(plan.places)
        levels = plan.timesteps.to(self.device)
        noise = self.noise(tuple(latents.shape), stage.coarse)
        noisy = noised(latents, noise, self.shares[levels])
        kept = torch.from_numpy(plan.kept).to(self.device)
        sizes = torch.from_numpy(plan.sizes * self.course.within).to(self.device)
        ids, ids_2, meant = (tensor.to(self.device) for tensor in (plan.ids, plan.ids_2, plan.meant))
        return Given(noisy, noise, levels, ids, ids_2, kept, sizes, meant)

    def text(self, given: Given, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """States, pooled vectors, and the error of what they tell; a share of the samples has what is set down."""
        first = round(share * len(given.meant))
        known, read = given.meant[:first], given.meant[first:]
        sure = self.told.whole(known, WORN, self.seed + APART), self.told.pooled(known)
        if not len(read):
            return *sure, sure[1].new_zeros(())
        states, pooled = self.painter.reader(given.ids[first:], given.ids_2[first:])
        squares, rest = cells.error(self.told, states, pooled, read)
        return torch.cat([sure[0], states]), torch.cat([sure[1], pooled]), squares + rest / 16

    def loss_of(self, given: Given, stage: Stage) -> Tensor:
        """The weighted error of the noise estimate, and that of what the text tells."""
        states, pooled, untold = self.text(given, stage.told)
        states, pooled = states * given.kept[:, None, None], pooled * given.kept[:, None]
        made = self.model(given.noisy, given.levels, states, pooled, given.sizes)
        errors = (made.float() - given.noise).square().mean((1, 2, 3))
        weighted: Tensor = (errors * importance(self.shares[given.levels], stage.emphasis)).mean()
        return weighted + TELLING * untold

    def advance(self, plan: Plan, store: Reservoir, share: float) -> Tensor:
        """One step; returns its loss, still on the device."""
        stage = self.course.stages[self.stage]
        first, last = stage.rates
        warm = min(1.0, (self.stage_step + 1) / 50)
        for group in self.optimiser.param_groups:
            group["lr"] = group["pace"] * warm * (first + (last - first) * share)
        given = self.given(plan, store, stage)
        self.optimiser.zero_grad(set_to_none=True)
        with short(self.device):
            loss = self.loss_of(given, stage)
        torch.autograd.backward(loss)
        self.team.share_gradients(self.painter)
        torch.nn.utils.clip_grad_norm_(self.painter.parameters(), 1.0)
        self.optimiser.step()
        self.average.update(self.painter, self.step)
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        self.samples += len(given.levels) * self.team.size
        return loss.detach()

    def enter(self, stage: int) -> None:
        """Begin a stage, if it is another than before; at the first that reads, the text encoders come taught."""
        stages = self.course.stages
        for parameter in self.inner:
            parameter.requires_grad_(not stages[stage].outer)
        if stage != self.stage:
            if self.team.rank == 0:
                self.keep()
            if unmet(self.course, self.stage) and not unmet(self.course, stage):
                known = taught().state_dict()
                for module in (self.painter, self.average.module):
                    module.get_submodule("reader").load_state_dict(known)
            self.stage, self.stage_step = stage, 0


class Clock:
    """Time spent, filling of reservoirs included, and when to save and report."""

    def __init__(self, run: Run, seconds: float) -> None:
        self.run, self.seconds = run, seconds
        self.began = self.saved = self.last = time.monotonic()
        self.losses: list[Tensor] = []
        self.samples = run.samples

    def over(self) -> bool:
        """Whether the time is up or the run is asked to stop, in any process of the team."""
        return self.run.team.any(asked_to_stop() or time.monotonic() - self.began > self.seconds)

    def tick(self, loss: Tensor) -> None:
        """Count a step; now and then report and save."""
        run, now = self.run, time.monotonic()
        run.spent, self.last = run.spent + now - self.last, now
        self.losses.append(loss)
        if run.step % REPORT_EVERY == 0 and run.team.rank == 0:
            mean = float(torch.stack(self.losses).mean())
            name, pace = run.course.stages[run.stage].name, (run.samples - self.samples) / (now - self.began)
            print(
                f"{run.course.name} stage {name} step {run.stage_step} loss {mean:.4f} samples {run.samples} "
                f"{pace:.1f}/s {now - self.began:.0f} s",
                flush=True,
            )
            self.losses.clear()
        if now - self.saved > SAVE_EVERY[run.device.type] and run.team.rank == 0:
            run.keep()
            self.saved = now


def steps_of(run: Run, clock: Clock) -> Iterator[float]:
    """Make the steps of the current stage; yields the loss of each until the stage or the time is over."""
    stores = Stores(run, run.stage)
    ahead = loader(stores.plans, run.workers, range(run.stage_step, 1 << 30))
    for plan in ahead:
        index, share = run.course.where(run.step, run.spent)
        if clock.over() or run.team.any(index != run.stage):
            return
        store = stores.prepare(plan, run.stage_step)
        if run.team.any(asked_to_stop()):
            return
        loss = run.advance(plan, store, share)
        clock.tick(loss)
        yield float(loss) if run.on_cpu else 0.0


def train(
    team: Team, course: Course, folder: Path = SECOND, seconds: float = 1e9, device: str | None = None,
    workers: int = 0, compiled: bool = False,
) -> list[float]:  # fmt: skip
    """Go on with a course until it is over or the time is spent; the state is saved on the way and at the end."""
    run = Run(course, folder, team, machine.device(device), workers)
    if compiled:
        run.model = torch.compile(run.painter)  # type: ignore[assignment]
    return carry_on(run, seconds)


def carry_on(run: Run, seconds: float) -> list[float]:
    """Go on with a run until its course is over or the time is spent; returns the losses (on a GPU, zeros)."""
    team, course = run.team, run.course
    clock, losses = Clock(run, seconds), []
    while not clock.over():
        index, _ = course.where(run.step, run.spent)
        if index >= len(course.stages):
            break
        run.enter(index)
        losses += list(steps_of(run, clock))
    if team.rank == 0:
        if run.step:  # one stopped before its first step has nothing that its base will not give again
            run.keep()
        print(f"{course.name}: {run.step} steps, {run.samples} samples, {run.spent:.0f} s", flush=True)
    return losses


def first_edition(folder: Path) -> UNet2DConditionModel:
    """The first edition's UNet, kept in the cache from when it was still the one in the package.

    Raises:
        ValueError: Another one was in the package by then.
    """
    kept = folder / "first_edition"
    if not kept.exists():
        beside = kept.with_suffix(".part")
        shutil.copytree(BUILTIN_FOLDER / "unet", beside, dirs_exist_ok=True)
        beside.rename(kept)
    made: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(kept, dtype=torch.float32)
    if tuple(made.config.block_out_channels) != architecture.UNET_WIDTHS:
        raise ValueError(
            f"{kept} is not the first edition's UNet: take src/impasto/models/builtin/unet from its commit"
        )
    return made


def unmet(course: Course, stage: int) -> bool:
    """Whether a stage comes before the UNet meets its text encoders, which are taught apart."""
    return not course.grown_from and stage < len(course.stages) and course.stages[stage].told == 1


def painter(course: Course, folder: Path = SECOND) -> Painter:
    """The averaged weights of a course."""
    done = checkpoint.load(folder / f"{course.name}.pt")
    if done is None:
        raise FileNotFoundError(
            f"no weights of the course {course.name!r} in {folder}: run `python -m training.second.learn`"
        )
    made = Painter(course)
    made.load_state_dict(done["average"])
    if unmet(course, done["stage"]):
        made.reader.load_state_dict(taught().state_dict())
    return made.requires_grad_(False).eval()


def options(about: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """What every course is started with: its name, ``course``, and where and how long it runs."""
    asked = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("course", choices=sorted(names))
    asked.add_argument("--seconds", type=float, default=1e9, help="of this run")
    asked.add_argument("--processes", type=int, default=1, help="on a CPU")
    asked.add_argument("--workers", type=int, default=0, help="that prepare steps ahead, on a GPU")
    asked.add_argument("--device", default=None)
    return asked


def start(work: Callable[..., list[float]], planned: Course, chosen: argparse.Namespace, *further: Any) -> None:
    """Go on with a course, in this process or in several, as the command line asks."""
    if chosen.processes > 1:
        together(chosen.processes, work, planned, SECOND, chosen.seconds, "cpu")
    else:
        heed()
        work(alone(), planned, SECOND, chosen.seconds, chosen.device, chosen.workers, *further)


def followed_by(suffix: str) -> list[str]:
    """The base courses that have such a course after them."""
    return [name for name in BASES if f"{name}-{suffix}" in COURSES]


def based_on(suffix: str, work: Callable[..., list[float]], about: str | None) -> None:
    """Start the course that follows a base model's, from the command line: ``base`` names the base's."""
    chosen = options(about, followed_by(suffix)).parse_args()
    start(work, COURSES[f"{chosen.course}-{suffix}"], chosen)


if __name__ == "__main__":
    asked = options(__doc__, BASES)
    asked.add_argument("--minutes", type=float, default=0.0, help="of the whole course, instead of counting samples")
    asked.add_argument("--compile", action="store_true")
    chosen = asked.parse_args()
    planned = COURSES[chosen.course]
    start(train, planned.lasting(chosen.minutes) if chosen.minutes else planned, chosen, chosen.compile)
