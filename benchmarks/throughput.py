"""How many pictures, how long to wait, under a mixed load? ``python -m benchmarks.throughput``.

The physics: requests come at random (Poisson arrivals) with LoRA sets, sizes, steps and seeds of their own. Ours moves
rows of several requests in one network call and switches LoRA sets between steps by patching weights; the baseline
(``benchmarks/baselines/one_by_one.py``) runs requests one after the other and loads and unloads LoRAs in between. Both
get the same requests at the same times after their start, one after the other on the same machine.

Two loads: ``saturated``, where all requests come at once and images a second is what counts; and ``poisson``, at a
share of our own saturated rate (``--load``), where the wait counts: from a request's arrival to its picture. Occupancy
is how many images share a network call. ``--sets 1 20`` measures several numbers of LoRA sets. Prints a table, then one
line of JSON, which is also written to ``benchmarks/results/throughput.json`` (``--out`` for another file).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from benchmarks import roofline
from benchmarks.baselines.one_by_one import Done, OneByOne
from benchmarks.machine import describe
from benchmarks.options import engine_options
from benchmarks.report import RESULTS, publish
from benchmarks.ways import LORA_SCALE, Diffusers, Ours, make_loras
from benchmarks.weights import model_folder
from impasto.engine.accel import choose_device, choose_dtype
from impasto.engine.engine import Engine
from impasto.types import Failed, Finished, GenerationRequest, LoraRef, Progress

PROMPTS: Final = ("a red fox", "a slice of pizza", "a green frog", "a star", "a sailing boat", "a blue bird")
DISTINCT: Final = 10  # files written; more sets are further names of them, each read and parsed as a file of its own


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes, in seconds after the start."""

    seconds: float
    request: GenerationRequest
    loras: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a load: an end for each arrival, and the images of each network call."""

    done: dict[int, Done]
    calls: list[int]
    started: float


def main() -> None:
    """Draw up the load, serve it both ways, report."""
    options = _options()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(options.model, options.models)
        files = make_loras(folder, min(DISTINCT, max(options.sets)), Path(scratch), options.rank)
        ours = Ours(folder, options.device, options.dtype, options.accel).engine
        peer = None if options.ours_only else Diffusers(folder, options.device, options.dtype)
        work = {side: roofline.count(ours._model.base.unet, ours._model.vae.network, side) for side in options.sizes}
        for sets in options.sets:
            names = named(files, sets, Path(scratch))
            rows += measure(options, ours, peer, names, work)
    setting = {name: getattr(options, name) for name in ("model", "device", "dtype", "accel", "requests", "load")}
    result = {"benchmark": "throughput", **setting, "rows": rows, "machine": describe()}
    publish(_table(rows), result, options.out)


def measure(
    options: argparse.Namespace,
    ours: Engine,
    peer: Diffusers | None,
    files: Sequence[Path],
    work: dict[int, roofline.Work],
) -> list[dict[str, Any]]:
    """Serve the saturated load, then the Poisson one, each way."""
    burst = arrivals(options, files, rate=None)
    operations = sum(work[a.request.width].request(a.request.num_inference_steps) for a in burst)
    warm_up(ours, peer, burst)
    rows = _both(ours, peer, burst, {"load": "saturated", "sets": len(files)})
    for row in rows:
        row["roofline"] = _roofline(operations, row["seconds"], options)
    rate = options.rate or options.load * rows[0]["images_per_s"]
    coming = arrivals(options, files, rate=rate)
    return rows + _both(ours, peer, coming, {"load": "poisson", "sets": len(files), "rate": round(rate, 4)})


def _both(
    ours: Engine, peer: Diffusers | None, load: Sequence[Arrival], setting: dict[str, Any]
) -> list[dict[str, Any]]:
    """Serve one load both ways, one after the other."""
    before = ours.usage()
    rows = [setting | {"way": "ours"} | summary(load, serve_ours(ours, load))]
    rows[0] |= {name: round(ours.usage()[name] - before[name], 3) for name in ("lora_switches", "lora_switch_seconds")}
    print(json.dumps(rows[0]), file=sys.stderr, flush=True)  # a run that is cut off has told what it knew
    if peer is not None:
        rows.append(setting | {"way": "one by one"} | summary(load, serve_peer(peer, load)))
        print(json.dumps(rows[1]), file=sys.stderr, flush=True)
    return rows


def named(files: Sequence[Path], count: int, scratch: Path) -> list[Path]:
    """Return ``count`` names of the files: hard links beyond the first of each, which count as files of their own."""
    names = list(files[:count])
    for extra in range(len(names), count):
        link = scratch / f"set-{extra}.safetensors"
        if not link.exists():
            link.hardlink_to(files[extra % len(files)])
        names.append(link)
    return names


def arrivals(options: argparse.Namespace, files: Sequence[Path], rate: float | None) -> list[Arrival]:
    """Draw requests, the same for every load; without a rate all come at once."""
    draw = random.Random(options.seed)
    times = random.Random(options.seed + 1)
    seconds, found = 0.0, []
    for number in range(options.requests):
        side = draw.choice(options.sizes)
        request = GenerationRequest(
            draw.choice(PROMPTS), width=side, height=side, num_inference_steps=draw.choice(options.steps), seed=number
        )
        found.append(Arrival(seconds, request, (draw.choice(files),)))
        seconds += times.expovariate(rate) if rate else 0.0
    return found


def warm_up(ours: Engine, peer: Diffusers | None, load: Sequence[Arrival]) -> None:
    """Make one short picture of each size each way; nobody's first call counts."""
    for side in sorted({arrival.request.width for arrival in load}):
        request = replace(load[0].request, width=side, height=side, num_inference_steps=2)
        list(ours.generate(request))
        if peer is not None:
            peer.draw(request)


def serve_ours(engine: Engine, load: Sequence[Arrival]) -> Served:
    """Submit each request when its time has come, and step in between, as the worker does."""
    start = time.perf_counter()
    done: dict[int, Done] = {}
    began: dict[str, float] = {}
    calls: list[int] = []
    waiting = list(enumerate(load))
    while waiting or engine.busy:
        now = time.perf_counter() - start
        while waiting and waiting[0][1].seconds <= now:
            number, arrival = waiting.pop(0)
            loras = tuple(LoraRef(str(path), LORA_SCALE) for path in arrival.loras)
            engine.submit(replace(arrival.request, loras=loras), str(number))
        if not engine.busy:
            time.sleep(max(0.0, waiting[0][1].seconds - (time.perf_counter() - start)))
            continue
        events = engine.step()
        moved = [event for event in events if isinstance(event, Progress)]
        calls += [moved[0].batch] * bool(moved)
        for step in moved:
            began.setdefault(step.request_id, time.perf_counter() - step.seconds)
        for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                done[int(event.request_id)] = Done(began[event.request_id], time.perf_counter())
    return Served(done, calls, start)


def serve_peer(peer: Diffusers, load: Sequence[Arrival]) -> Served:
    """Give each request to the one-by-one server when its time has come."""
    server = OneByOne(peer)
    start = time.perf_counter()
    for number, arrival in enumerate(load):
        time.sleep(max(0.0, arrival.seconds - (time.perf_counter() - start)))
        server.submit(number, arrival.request, arrival.loras)
    server.close()
    return Served(server.done, [1] * len(load), start)


def summary(load: Sequence[Arrival], served: Served) -> dict[str, Any]:
    """Rates and waits of a served load; seconds, to three places."""
    came = {number: served.started + arrival.seconds for number, arrival in enumerate(load)}
    until_begun = [served.done[n].began - came[n] for n in came]
    until_done = [served.done[n].ended - came[n] for n in came]
    seconds = max(done.ended for done in served.done.values()) - served.started
    return {
        "seconds": round(seconds, 3),
        "images_per_s": round(len(load) / seconds, 4),
        **{f"latency_{name}": value for name, value in _percentiles(until_done).items()},
        **{f"wait_{name}": value for name, value in _percentiles(until_begun).items()},
        "occupancy": round(statistics.mean(served.calls), 2),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{share}": round(cuts[share - 1], 3) for share in (50, 95, 99)}


def _roofline(operations: float, seconds: float, options: argparse.Namespace) -> dict[str, float]:
    place = choose_device(options.device)
    return roofline.line(operations, seconds, str(place), choose_dtype(options.dtype, place))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "load", "sets", "way", "images/s", "done: p50", "p95", "p99", "begun: p95", "images a call", "of peak"
    )
    for row in rows:
        waits = [f"{row[f'latency_{name}']:.2f}" for name in ("p50", "p95", "p99")]
        share = f"{row['roofline']['share_of_peak']:.0%}" if "roofline" in row else ""
        begun = f"{row['wait_p95']:.2f}"
        setting = row["load"], str(row["sets"]), row["way"], f"{row['images_per_s']:.3f}"
        table.add_row(*setting, *waits, begun, f"{row['occupancy']:.2f}", share)
    return table


def _options() -> argparse.Namespace:
    asked = engine_options(__doc__)
    asked.add_argument("--accel", default="auto", help="ours with these switches")
    asked.add_argument("--requests", type=int, default=60)
    asked.add_argument("--sets", type=int, nargs="+", default=[20], help="LoRA sets, each a file")
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512])
    asked.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20])
    asked.add_argument("--load", type=float, default=0.8, help="Poisson arrivals, as a share of our saturated rate")
    asked.add_argument("--rate", type=float, help="Poisson arrivals a second, instead of --load")
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--ours-only", action="store_true")
    asked.add_argument("--out", type=Path, default=RESULTS / "throughput.json")
    return asked.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
