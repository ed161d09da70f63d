"""How long does one picture take? ``python -m benchmarks.latency``.

The physics: a step is one UNet call on a batch of two (with and without the prompt); its work grows with the pixels,
and faster where self-attention counts. The VAE decode comes once. LoRAs that are merged into the weights cost a step
nothing; beside the weights they cost two thin products each. Ours and diffusers' pipeline run the same networks in the
same process, in turn, so their ratio tells what our way saves; the seconds tell about the machine. Beside them stands
the roofline: operations counted, and the share of the machine's measured peak (large matrix products in the same
number format).

``--model full`` is SDXL's real size with random weights, ``reduced`` a tenth of its width. Prints a table, then one
line of JSON, which is also written to ``benchmarks/results/latency.json`` (``--out`` for another file).
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import roofline
from benchmarks.machine import describe
from benchmarks.options import engine_options
from benchmarks.report import RESULTS, publish
from benchmarks.ways import NO_LORAS, PEERS, Diffusers, Ours, Way, make_loras, make_ways
from benchmarks.weights import model_folder
from impasto.engine.accel import choose_device, choose_dtype
from impasto.types import GenerationRequest

PROMPT = "a red fox on a blue background"


def main() -> None:
    """Measure every size, step count and number of LoRAs, and report."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(options.model, options.models)
        loras = make_loras(folder, max(options.loras), Path(scratch), options.rank)
        peers = [] if options.ours_only else options.peers
        ways = make_ways(folder, options.device, options.dtype, options.accels, peers)
        work = {side: roofline.count(*_networks(ways), side) for side in options.sizes}
        rows = []
        for count, side, steps in itertools.product(options.loras, options.sizes, options.steps):
            rows.append(measure(ways, work[side], side, steps, loras[:count], options))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # a run that is cut off has told what it knew
    result = {
        "benchmark": "latency",
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "rows": rows,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "machine": describe(),
    }
    publish(_table(rows), result, options.out)


def measure(
    ways: dict[str, Way], work: roofline.Work, side: int, steps: int, loras: list[Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Time one setting: ``runs`` pictures each way in turn, after one of each that does not count.

    Returns:
        ``seconds`` and ``cpu_seconds`` (medians) by way; ``ratio``, the first way's seconds over each other's, as the
        median of pairs of neighbouring runs; ``roofline`` by way.
    """
    request = GenerationRequest(PROMPT, width=side, height=side, num_inference_steps=steps, seed=7)
    running = {name: way for name, way in ways.items() if not (loras and name in NO_LORAS)}
    wall: dict[str, list[float]] = {name: [] for name in running}
    cpu: dict[str, list[float]] = {name: [] for name in running}
    for way in running.values():
        way.wear(loras)
    for run in range(options.runs + 1):
        for name, way in running.items():
            start, used = time.perf_counter(), time.process_time()
            way.draw(request)
            if run:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
    for way in running.values():
        way.wear(())
    first, *others = running
    place = choose_device(options.device)
    kind = choose_dtype(options.dtype, place)
    seconds = {name: statistics.median(values) for name, values in wall.items()}
    return {
        "side": side,
        "steps": steps,
        "loras": len(loras),
        "runs": options.runs,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "cpu_seconds": {name: round(statistics.median(values), 4) for name, values in cpu.items()},
        "ratio": {name: _ratio(wall[first], wall[name]) for name in others},
        "ratio_cpu": {name: _ratio(cpu[first], cpu[name]) for name in others},
        "roofline": {
            name: roofline.line(work.request(steps), value, str(place), kind) for name, value in seconds.items()
        },
    }


def _ratio(mine: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(mine, others, strict=True)), 3)


def _networks(ways: dict[str, Way]) -> tuple[Any, Any]:
    """UNet and VAE of any way: all have the same."""
    way = next(iter(ways.values()))
    if isinstance(way, Diffusers):
        return way.pipeline.unet, way.pipeline.vae
    assert isinstance(way, Ours)
    return way.engine._model.base.unet, way.engine._model.vae.network


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("size", "steps", "LoRAs", "way", "s", "CPU s", "first way / this", "TFLOP/s", "share of peak")
    for row in rows:
        for name, seconds in row["seconds"].items():
            ratio = row["ratio"].get(name)
            roof = row["roofline"][name]
            setting = (str(row["side"]), str(row["steps"]), str(row["loras"]))
            figures = f"{seconds:.3f}", f"{row['cpu_seconds'][name]:.3f}", "" if ratio is None else f"{ratio:.2f}"
            table.add_row(*setting, name, *figures, f"{roof['tflop_per_s']:.3g}", f"{roof['share_of_peak']:.0%}")
    return table


def _options() -> argparse.Namespace:
    peers = ["diffusers"] if not torch.cuda.is_available() else list(PEERS)
    asked = engine_options(__doc__)
    asked.add_argument("--accels", nargs="+", default=["auto"], help="ours with each of these switches")
    asked.add_argument("--peers", nargs="*", default=peers, choices=list(PEERS))
    asked.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024], help="sides, in pixels")
    asked.add_argument("--steps", type=int, nargs="+", default=[4, 20, 30])
    asked.add_argument("--loras", type=int, nargs="+", default=[0, 1, 5], help="how many are on")
    asked.add_argument("--rank", type=int, default=32)
    asked.add_argument("--runs", type=int, default=2, help="counted runs of each setting")
    asked.add_argument("--ours-only", action="store_true", help="leave the peers out, for a true peak memory")
    asked.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    return asked.parse_args()


if __name__ == "__main__":
    main()
