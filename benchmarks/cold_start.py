"""How long until the first picture, and whom does a new LoRA hold up? ``python -m benchmarks.cold_start``.

The physics: a start pays for imports, for reading weights and for the first call's set-up. A LoRA that nobody has used
is read from the disk, parsed, made ready for each weight and put on; whatever part of that happens between two steps of
other jobs holds those up. diffusers does all of it inside ``load_lora_weights``, and nothing else moves meanwhile.

Two parts. ``start``: fresh processes, ours and diffusers', from the process's start to the first and to the second
picture. ``stall``: jobs are running; one arrives with a LoRA whose file is not in memory: it was not touched before
(``cold``), was read ahead, but not parsed (``read ahead``), is made ready by another thread while the others step, as
the worker has it done (``preloaded``), or was used before (``warm``). Told are, from the arrival to the new job's first
step, the usual gap between two steps before it; the longest gap; the processor time of the stepping thread in the step
that took most of it (``longest_work``; on a machine with other work, the fairer figure); the part of the longest gap's
step that changed weights (``switch``); and for ``preloaded`` the seconds that it took (``ready``) and the median and
longest gap meanwhile. What a cold file costs others is ``longest_work`` over that of ``warm``, less the difference of
their switches: a set's second switch copies weights that its first one made.

Prints a table, then one line of JSON, which is also written to ``benchmarks/results/cold_start.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from benchmarks.machine import ROOT, describe
from benchmarks.options import engine_options
from benchmarks.report import RESULTS, publish

SIDES: Final = {"builtin": 256, "reduced": 256, "full": 1024}
RUNNING: Final = 2  # jobs that are under way when the new one arrives
STEPS: Final = 50  # of each


def main() -> None:
    """Measure both parts and report."""
    options = _options()
    if options.run:
        print(json.dumps(first_pictures(options)))
        return
    from benchmarks.weights import model_folder

    folder = model_folder(options.model, options.models)
    starts = {
        way: [_in_fresh_process(way, folder, options) for _ in range(options.runs)] for way in ("ours", "diffusers")
    }
    start = {way: _medians(runs) for way, runs in starts.items()}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        stall = stalls(folder, Path(scratch), options)
    setting = {name: getattr(options, name) for name in ("model", "device", "dtype", "accel", "side", "runs", "rank")}
    result = {"benchmark": "cold_start", **setting, "start": start, "stall": stall, "machine": describe()}
    publish(_table(start, stall), result, options.out)


def first_pictures(options: argparse.Namespace) -> dict[str, float]:
    """In a fresh process: seconds from its start to each milestone."""
    began = options.began
    from benchmarks.ways import Diffusers, Ours
    from impasto.types import GenerationRequest

    seconds = {"imported": time.time() - began}
    request = GenerationRequest("a red fox", width=options.side, height=options.side, num_inference_steps=4, seed=1)
    way = (
        Ours(options.model, options.device, options.dtype, options.accel)
        if options.run == "ours"
        else Diffusers(options.model, options.device, options.dtype)
    )
    seconds["loaded"] = time.time() - began
    for name in ("first_picture", "second_picture"):
        way.draw(request)
        seconds[name] = time.time() - began
    return {name: round(value, 3) for name, value in seconds.items()}


def stalls(folder: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Gaps between steps, in seconds, while a job with a LoRA arrives in each way, and diffusers' load."""
    from benchmarks.ways import Diffusers, Ours, make_loras
    from impasto.worker.warming import read_ahead

    engine = Ours(folder, options.device, options.dtype, options.accel).engine
    files = make_loras(folder, 3 * options.runs + 1, scratch, options.rank)
    os.sync()  # pages that were not written yet cannot be dropped
    _arrival(engine, files[-1], Way(), options)  # nobody's first call counts
    ways = {"cold": Way(), "read ahead": Way(read=read_ahead), "preloaded": Way(preloads=True), "warm": Way()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for run in range(options.runs):  # in turn, so that what else the machine does meets all alike
        for place, (name, way) in enumerate(ways.items()):
            file = files[0 if name == "warm" else 3 * run + place]
            if name != "warm":
                drop_from_cache(file)
            runs[name].append(_arrival(engine, file, way, options))
    found: dict[str, Any] = {name: _medians(own) for name, own in runs.items()}
    del engine
    peer = Diffusers(folder, options.device, options.dtype)
    loads = []
    for file in files[: 2 * options.runs]:
        drop_from_cache(file)
        start = time.perf_counter()
        peer.wear([file])
        loads.append({"longest_gap": time.perf_counter() - start})
    return found | {"diffusers, load": _medians(loads)}


@dataclass(frozen=True, slots=True)
class Way:
    """What is done about a job's LoRA before the job is handed in.

    Attributes:
        read: Reads its file; on another thread in the worker, so here while nobody steps.
        preloads: Whether it is made ready while the others step.
    """

    read: Callable[[Path], object] = lambda file: None
    preloads: bool = False


def _arrival(engine: Any, file: Path, way: Way, options: argparse.Namespace) -> dict[str, float]:
    """Let jobs run, then one with a LoRA arrive; return what the module says, in seconds."""
    from impasto.types import GenerationRequest, LoraRef, Progress

    def request(**changes: Any) -> GenerationRequest:
        fields = {"width": options.side, "height": options.side, "num_inference_steps": STEPS} | changes
        return GenerationRequest("a red fox", **fields)

    running = [engine.submit(request(seed=seed)) for seed in range(RUNNING)]
    for _ in range(4):  # admission and the first, measured calls
        engine.step()
    before = [_stepped(engine) for _ in range(6)]
    way.read(file)
    new = request(loras=(LoraRef(str(file), 0.7),), num_inference_steps=2, seed=9)
    figures: dict[str, float] = {"usual_gap": statistics.median(step.seconds for step in before)}
    if way.preloads:
        figures |= _preloaded(engine, new)
    arrived = engine.submit(new)
    after = [_stepped(engine)]
    while not any(isinstance(event, Progress) and event.request_id == arrived for event in after[-1].events):
        after.append(_stepped(engine))
    for request_id in (*running, arrived):
        engine.cancel(request_id)
    longest = max(after, key=lambda step: step.work)
    gap = max(step.seconds for step in after)
    return figures | {"longest_gap": gap, "longest_work": longest.work, "switch": longest.switch}


def _preloaded(engine: Any, request: Any) -> dict[str, float]:
    """Have a request made ready while others step, for as long as they have steps to do."""
    start = time.perf_counter()
    thread = threading.Thread(target=engine.preload, args=(request,))
    thread.start()
    steps = []
    while thread.is_alive() and engine.busy:
        steps.append(_stepped(engine).seconds)
    thread.join()
    ready = time.perf_counter() - start
    return {"ready": ready, "gap_meanwhile": statistics.median(steps), "longest_gap_meanwhile": max(steps)}


@dataclass(frozen=True, slots=True)
class Step:
    """What a step took, in seconds: in all, on its thread's processor, and for weights; and what came of it."""

    seconds: float
    work: float
    switch: float
    events: list[Any]


def _stepped(engine: Any) -> Step:
    start, work, switch = time.perf_counter(), time.thread_time(), engine.usage()["lora_switch_seconds"]
    events = engine.step()
    switched = engine.usage()["lora_switch_seconds"] - switch
    return Step(time.perf_counter() - start, time.thread_time() - work, switched, events)


def drop_from_cache(file: Path) -> None:
    """Ask the system to forget a file's pages, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_fresh_process(way: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cold_start", "--run", way, "--model", folder]
    command += ["--device", options.device, "--dtype", options.dtype, "--side", str(options.side)]
    command += [f"--accel={options.accel}", "--began", str(time.time())]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def _table(start: dict[str, dict[str, float]], stall: dict[str, dict[str, float]]) -> Table:
    table = Table("part", "way", "figures, seconds")
    for part, ways in (("start", start), ("stall", stall)):
        for way, figures in ways.items():
            table.add_row(part, way, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items()))
    return table


def _options() -> argparse.Namespace:
    asked = engine_options(__doc__)
    asked.add_argument("--accel", default="auto")
    asked.add_argument("--side", type=int, help="pixels; by default what suits the model")
    asked.add_argument("--rank", type=int, default=32)
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--scratch", type=Path, help="folder for LoRA files, on a disk; by default the temporary one")
    asked.add_argument("--out", type=Path, default=RESULTS / "cold_start.json")
    asked.add_argument("--run", choices=["ours", "diffusers"], help=argparse.SUPPRESS)  # what a fresh process does
    asked.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = asked.parse_args()
    options.side = options.side or SIDES.get(options.model, 512)
    return options


if __name__ == "__main__":
    main()
