"""How long does one picture take, and in how much memory? ``python -m benchmarks.latency``.

The physics: a step is one UNet call on a batch of two (with and without the prompt); its work grows with the pixels,
and faster where self-attention counts. The VAE decode comes once. Ours and diffusers' pipeline run the same network
in the same process, in turn, so their ratio tells what our loop costs or saves; the seconds tell about the machine.

Prints a table, then one line of JSON, which is also written to ``benchmarks/results/latency.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from impasto.engine.engine import Engine
from impasto.models.catalog import find_model
from impasto.types import GenerationRequest

RESULT = Path(__file__).parent / "results" / "latency.json"
PROMPT = "a red fox on a blue background"


def main() -> None:
    """Measure every size and step count and report."""
    options = _options()
    engine = Engine.load(options.model)
    pipeline = None if options.ours_only else _diffusers(options.model)
    rows = [measure(engine, pipeline, side, steps, options.runs) for side in options.sizes for steps in options.steps]
    result = {
        "benchmark": "latency",
        "model": options.model,
        "rows": rows,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "machine": describe(),
    }
    _print(rows, result["peak_memory_mib"])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def measure(
    engine: Engine, pipeline: StableDiffusionXLPipeline | None, side: int, steps: int, runs: int
) -> dict[str, Any]:
    """Time one setting: medians of ``runs`` pictures each way, after one of each that does not count."""
    request = GenerationRequest(PROMPT, width=side, height=side, num_inference_steps=steps, seed=7)
    ways: dict[str, Callable[[], object]] = {"ours": lambda: list(engine.generate(request))}
    if pipeline is not None:
        ways["diffusers"] = lambda: pipeline(
            PROMPT,
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(7),
        )
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if run:
                times[name].append(time.perf_counter() - start)
    seconds = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return {"side": side, "steps": steps, "runs": runs, "seconds": seconds}


def _diffusers(model: str) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        find_model(model).path, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _print(rows: list[dict[str, Any]], peak: int) -> None:
    table = Table("size", "steps", "ours, s", "diffusers, s", "ours/diffusers", caption=f"peak memory {peak} MiB")
    for row in rows:
        ours, theirs = row["seconds"]["ours"], row["seconds"].get("diffusers")
        compared = (f"{theirs:.2f}", f"{ours / theirs:.2f}") if theirs else ("", "")
        table.add_row(f"{row['side']}", f"{row['steps']}", f"{ours:.2f}", *compared)
    Console(file=sys.stdout).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin", help="model to time (default: builtin)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024], help="sides, in pixels")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 20, 30])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each setting")
    parser.add_argument("--ours-only", action="store_true", help="leave diffusers out, for a true peak memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
