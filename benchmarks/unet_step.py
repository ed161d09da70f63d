"""How long does one denoising step take, beside diffusers and OpenVINO? ``python -m benchmarks.unet_step``.

The physics: a guided step is one UNet call on two rows, and nearly all of it is products of matrices, so the share of
the processor's measured peak says how much is left to gain. diffusers runs the plain network; ours runs the same
weights (of one UNet in memory, so that both fit); OpenVINO has them compiled in and cannot change them. Calls of the
ways alternate, and the ratios are medians of neighbouring pairs.

``--model full`` is SDXL's real size with random weights. Prints a table, then one line of JSON, which is also written
to ``benchmarks/results/unet_step.json`` (``--out`` for another file).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.table import Table
from torch import Tensor

from benchmarks import roofline
from benchmarks.baselines.openvino_unet import read_openvino, trace_openvino
from benchmarks.machine import describe
from benchmarks.options import engine_options
from benchmarks.report import RESULTS, publish
from benchmarks.unets import ROWS, inputs_of, make_unet
from benchmarks.weights import SIZES
from impasto.engine.accel import Accel, accelerate_denoiser, choose_device, choose_dtype
from impasto.models.denoiser import Denoiser
from impasto.models.residence import Residence

Call = Callable[..., Tensor]


def main() -> None:
    """Time every size, and report."""
    options = _options()
    place = choose_device(options.device)
    dtype = choose_dtype(options.dtype, place)
    with tempfile.TemporaryDirectory() as folder:
        sides = options.sizes if options.openvino else []
        traced = trace_openvino(options.model, dtype, sides, Path(folder))  # before there is anything else in memory
        rows = list(measured(options, place, dtype, traced))
    setting = {"model": options.model, "dtype": str(dtype).removeprefix("torch."), "accel": options.accel}
    result = {"benchmark": "unet_step", **setting, "threads": torch.get_num_threads(), "rows": rows}
    publish(_table(rows), result | {"machine": describe()}, options.out)


def measured(
    options: argparse.Namespace, place: torch.device, dtype: torch.dtype, traced: dict[int, Path]
) -> Iterator[dict[str, Any]]:
    """Time each size."""
    unet = make_unet(options.model, dtype).to(place)
    ways = {"ours": ours(unet, Accel.parse(options.accel), place, dtype), "diffusers": plain(unet, place, dtype)}
    for side in options.sizes:
        if side in traced:
            ways["OpenVINO"] = read_openvino(traced[side], dtype, torch.get_num_threads())
        row = measure(ways, inputs_of(unet.config, side), options.runs, compare=options.model not in SIZES)
        work = roofline.unet_operations(unet.config, side, ROWS)
        lines = {name: roofline.line(work, value, str(place), dtype) for name, value in row["seconds"].items()}
        ways.pop("OpenVINO", None)
        print(json.dumps(row := row | {"side": side, "roofline": lines}), file=sys.stderr, flush=True)
        yield row


def plain(unet: Any, place: torch.device, dtype: torch.dtype) -> Call:
    """diffusers' network as it is."""
    return _denoiser(unet, place, dtype).predict


def ours(unet: Any, accel: Accel, place: torch.device, dtype: torch.dtype) -> Call:
    """Ours over the same weights; only what is packed or fused is held twice."""
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(dict(unet.config))
    twin.load_state_dict(unet.state_dict(), assign=True)
    denoiser = _denoiser(twin.requires_grad_(False).eval(), place, dtype)
    accelerate_denoiser(denoiser, accel)
    return denoiser.predict


def _denoiser(unet: Any, place: torch.device, dtype: torch.dtype) -> Denoiser:
    return Denoiser(unet, {}, True, False, place, dtype, Residence({"unet": place}, "none"))


@torch.inference_mode()
def measure(ways: dict[str, Call], inputs: tuple[Tensor, ...], runs: int, *, compare: bool) -> dict[str, Any]:
    """Time ``runs`` calls of each way in turn, after one of each that does not count.

    Returns:
        ``seconds`` and ``cpu_seconds`` (medians) by way; ``ratio`` and ``ratio_cpu``: the other's time over ours,
        medians of neighbouring pairs; ``difference``: norm of each answer's difference from diffusers', relative, if
        ``compare`` (of random weights it says nothing: they amplify every rounding).
    """
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    answers = {name: call(*inputs) for name, call in ways.items()}
    for _ in range(runs):
        for name, call in ways.items():
            start, used = time.perf_counter(), time.process_time()
            call(*inputs)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    others = [name for name in ways if name != "ours"]
    exact = answers["diffusers"]
    apart = {name: float(f"{(a - exact).norm() / exact.norm():.2g}") for name, a in answers.items()}
    return {
        "runs": runs,
        "seconds": {name: round(statistics.median(values), 4) for name, values in wall.items()},
        "cpu_seconds": {name: round(statistics.median(values), 4) for name, values in cpu.items()},
        "ratio": {name: _ratio(wall[name], wall["ours"]) for name in others},
        "ratio_cpu": {name: _ratio(cpu[name], cpu["ours"]) for name in others},
        "difference": apart if compare else {},
    }


def _ratio(theirs: list[float], mine: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(theirs, mine, strict=True)), 3)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("size", "way", "s", "CPU s", "this / ours", "in CPU s", "TFLOP/s", "share of peak", "difference")
    for row in rows:
        for name, seconds in row["seconds"].items():
            ratios = (f"{row[kind][name]:.2f}" if name in row[kind] else "" for kind in ("ratio", "ratio_cpu"))
            roof = row["roofline"][name]
            figures = f"{seconds:.3f}", f"{row['cpu_seconds'][name]:.3f}", *ratios
            apart = f"{row['difference'][name]:.1e}" if row["difference"] else ""
            peak = f"{roof['tflop_per_s']:.3g}", f"{roof['share_of_peak']:.0%}", apart
            table.add_row(str(row["side"]), name, *figures, *peak)
    return table


def _options() -> argparse.Namespace:
    asked = engine_options(__doc__)
    asked.set_defaults(device="cpu")
    asked.add_argument("--accel", default="auto", help="our switches, as a comma list")
    asked.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides, in pixels")
    asked.add_argument("--runs", type=int, default=5, help="counted calls of each way")
    asked.add_argument("--openvino", action=argparse.BooleanOptionalAction, default=find_spec("openvino") is not None)
    asked.add_argument("--out", type=Path, default=RESULTS / "unet_step.json")
    return asked.parse_args()


if __name__ == "__main__":
    main()
