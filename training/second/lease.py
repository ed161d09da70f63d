"""Everything that one GPU is wanted for, in one command that may be cut into several: ``bash training/gpu.sh MINUTES``.

The machine can reach nothing, so ``pack`` lays out beforehand all it needs in one small folder; ``run`` goes on with
the phases, each for its share of the whole time, from wherever the last call stopped; what it leaves in the folder of
results is small enough to be carried home and is taken apart there by ``take``. Knows files and time. Does not know
how anything is learned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training import checkpoint
from training.places import CACHE
from training.second import art as drawings
from training.second import autoencoder, few_steps, judge, learn, machine, preview, reading, refiner
from training.second.course import COURSES, Course
from training.second.places import SECOND
from training.second.vocabulary import vocabulary
from training.team import alone, asked_to_stop, heed

LUGGAGE = CACHE.parent / "gpu"
NEEDED = ("art.zip", "vocabulary.json", "reading.pt", "told.pt", "vae.pt")
LEDGER = "ledger.json"
RESULTS, PART = "weights.zip", 15 << 20  # bytes of one part
RESERVE = 45.0  # seconds at the end of a call for pictures and results


@dataclass(frozen=True)
class Lease:
    """Where a call works, on what, and with how many helpers."""

    folder: Path
    out: Path
    base: Course
    device: str | None
    workers: int
    compiled: bool = False

    def course(self, kind: str, minutes: float) -> Course:
        """The base course or one beside it, for so long."""
        return COURSES[f"{self.base.name}{kind}"].lasting(minutes)


def sharpen(lease: Lease, minutes: float, seconds: float) -> None:
    """The autoencoder, both halves: this training starts anew, so its latent space may."""
    on_gpu = machine.device(lease.device).type == "cuda"
    batch, side, steps = (128, 128, 100_000) if on_gpu else (2, 64, 2)
    autoencoder.train("all", steps, seconds, machine.device(lease.device), batch, side)


def inside(lease: Lease, minutes: float, seconds: float) -> None:
    """What the base grows around, and its text encoders; nothing where it grows around nothing."""
    if lease.base.grown_from:
        course = COURSES[lease.base.grown_from].lasting(minutes)
        learn.train(alone(), course, lease.folder, seconds, lease.device, lease.workers, lease.compiled)


def base(lease: Lease, minutes: float, seconds: float) -> None:
    """UNet and text encoders."""
    course = lease.course("", minutes)
    learn.train(alone(), course, lease.folder, seconds, lease.device, lease.workers, lease.compiled)


def judging(lease: Lease, minutes: float, seconds: float) -> None:
    """The evaluation's judge."""
    judge.train(20_000, seconds, lease.device, lease.folder / "judge.pt")


def refine(lease: Lease, minutes: float, seconds: float) -> None:
    """The refiner."""
    refiner.train(alone(), lease.course("-refiner", minutes), lease.folder, seconds, lease.device, lease.workers)


def distil(lease: Lease, minutes: float, seconds: float) -> None:
    """The few-step LoRA."""
    few_steps.train(alone(), lease.course("-few-steps", minutes), lease.folder, seconds, lease.device, lease.workers)


PHASES: dict[str, tuple[float, Callable[[Lease, float, float], None]]] = {
    "autoencoder": (0.09, sharpen),
    "inner": (0.33, inside),
    "base": (0.32, base),
    "refiner": (0.12, refine),
    "few-steps": (0.10, distil),
    "judge": (0.04, judging),
}
"""Each phase's share of the whole time, in order."""


def spent(folder: Path) -> dict[str, float]:
    """Seconds spent on each phase so far."""
    path = folder / LEDGER
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return {name: found.get(name, 0.0) for name in PHASES}


def run(lease: Lease, minutes: float, whole: float) -> None:
    """Go on with the phases for so many minutes, out of the whole; then leave results.

    Args:
        lease: Where and on what.
        minutes: Of this call.
        whole: Minutes of all calls together.
    """
    ends = time.monotonic() + 60 * minutes - RESERVE
    for name, (share, work) in PHASES.items():
        ledger = spent(lease.folder)
        left = min(60 * whole * share - ledger[name], ends - time.monotonic())
        if left <= 1 or asked_to_stop():
            continue
        print(f"== {name}: {left:.0f} s", flush=True)
        began = time.monotonic()
        try:
            work(lease, whole * share, left)
        finally:  # what there is comes home even from a phase that failed
            ledger[name] += time.monotonic() - began
            (lease.folder / LEDGER).write_text(json.dumps(ledger))
            results(lease)
    pictures(lease)


def pictures(lease: Lease) -> None:
    """The sheet of pictures, from the averaged weights, at 512 and 1024 px."""
    if not (lease.folder / f"{lease.base.name}.pt").exists():
        return
    place = machine.device(lease.device)
    made, vae = learn.painter(lease.base, lease.folder).to(place), autoencoder.settled().to(place)
    for side in (64, 128) if place.type == "cuda" else (8,):
        preview.draw(made, vae, lease.out / f"preview-{8 * side}.png", side, side, 20 if place.type == "cuda" else 2)


def halved(value: Any) -> Any:
    """Tensors of a state in half precision."""
    if isinstance(value, torch.Tensor):
        return value.half() if value.is_floating_point() else value
    return {key: halved(item) for key, item in value.items()} if isinstance(value, dict) else value


def light(path: Path) -> dict[str, Any]:
    """A run's state without what only its optimiser needs; the averaged weights stand for the live ones."""
    state = checkpoint.load(path)
    assert state is not None
    if "average" not in state:
        return dict(halved({key: value for key, value in state.items() if key != "optimiser"}))
    kept = {key: state[key] for key in ("stage", "stage_step", "step", "samples", "spent")}
    average = halved(state["average"])
    return kept | {"average": average, "live": average}


def results(lease: Lease) -> None:
    """Averaged weights in half precision, in parts that can be carried home."""
    lease.out.mkdir(parents=True, exist_ok=True)
    beside = lease.folder / RESULTS
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        inner = [f"{lease.base.grown_from}.pt"] if lease.base.grown_from else []
        for name in (*inner, f"{lease.base.name}.pt", f"{lease.base.name}-refiner.pt", "vae.pt", "judge.pt"):
            if (lease.folder / name).exists():
                torch.save(light(lease.folder / name), lease.folder / "light.tmp")
                archive.write(lease.folder / "light.tmp", name)
        for name in (f"{lease.base.name}-few-steps.safetensors", LEDGER):
            if (lease.folder / name).exists():
                archive.write(lease.folder / name, name)
    whole = beside.read_bytes()
    for at in range(0, len(whole), PART):
        (lease.out / f"{RESULTS}.{at // PART:02d}").write_bytes(whole[at : at + PART])
    print(f"results: {len(whole) / 1e6:.1f} MB", flush=True)


def take(source: Path, folder: Path = SECOND) -> list[str]:
    """Put a call's results together again and into the training folder; returns the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = sorted(source.glob(f"{RESULTS}.??"))
    if not parts:
        raise FileNotFoundError(f"no {RESULTS}.* in {source}")
    joined = folder / RESULTS
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(folder)
        return archive.namelist()


def pack(folder: Path = LUGGAGE) -> int:
    """Lay out what a call needs; returns its bytes. Wheels, where they are wanted, go into ``wheels`` beside it."""
    if not drawings.PACK.exists():
        drawings.pack()
    vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"average": halved(reading.trained().state_dict())}, folder / "reading.pt")
    for name in ("art.zip", "vocabulary.json", "told.pt"):
        shutil.copy(SECOND / name, folder)
    torch.save(halved(autoencoder.settled().state_dict()), folder / "vae.pt")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def unpack(source: Path, folder: Path) -> None:
    """What was carried here, where it is not in place yet; results of an earlier lease are gone on from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NEEDED:
        if (source / name).exists() and not (folder / name).exists():
            shutil.copy(source / name, folder)
    if list(source.glob(f"{RESULTS}.??")) and not (folder / LEDGER).exists():
        take(source, folder)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("what", choices=("pack", "run", "take"))
    asked.add_argument("--minutes", type=float, default=9.0, help="of this call")
    asked.add_argument("--whole", type=float, default=24.0, help="minutes of all calls together")
    asked.add_argument("--course", default="gpu")
    asked.add_argument("--luggage", type=Path, default=LUGGAGE)
    asked.add_argument("--out", type=Path, default=Path("out/gpu"))
    asked.add_argument("--device", default=None)
    asked.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    asked.add_argument("--compile", action="store_true")
    chosen = asked.parse_args()
    if chosen.what == "pack":
        print(f"{chosen.luggage}: {pack(chosen.luggage) / 1e6:.1f} MB")
    elif chosen.what == "take":
        print(f"{SECOND}: {', '.join(take(chosen.out))}")
    else:
        heed()
        unpack(chosen.luggage, SECOND)
        course = COURSES[chosen.course]
        run(
            Lease(SECOND, chosen.out, course, chosen.device, chosen.workers, chosen.compile),
            chosen.minutes,
            chosen.whole,
        )
