"""What does it cost to put LoRAs on and off a full-size SDXL? ``python -m benchmarks.lora_switch``.

The physics: the 722 linears of SDXL's attention blocks hold 2.2 billion weights, 4.4 GB in bfloat16. A switch reads
the model's own weights and writes the patched ones, 8.8 GB through memory, and multiplies two thin matrices for each:
4.4 billion multiplications for every unit of rank. Ours is one pass, from own weights straight to patched ones. PEFT
takes the old LoRA off by subtracting it (a product and a pass), loads the new one (a pass over the modules), and adds
it (a product, a rounding and a pass), and what it subtracted is not quite what it had added.

Real names and widths, random weights, the same network for both in turn. Files are in bfloat16, where the model's own
format can hold the factors, and in float16, where it cannot and we add in float32 instead. Timed are a switch between
two sets that were used before, and a file's whole way: read, put on, taken off, with nothing kept from before but our
copies of the model's own weights. Where memory allows, also switches between sets whose patched weights are kept.

Prints tables, then one line of JSON, which is also written to ``benchmarks/results/lora_switch.json``. ``--memory N``
measures instead the process's memory over N switches, and writes ``lora_switch_memory_WIDTH.json``. ``--mixed``
measures, on a GPU if there is one, whether a batch of rows with a LoRA each is better run unmerged, and only prints.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.lora_batches import mixed, stacked
from benchmarks.lora_networks import WIDTHS, make_unet, targets, write_lora
from benchmarks.machine import describe
from impasto.engine.memory import free_memory, process_memory
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.types import LoraRef

RESULTS = Path(__file__).parent / "results"
MIB = 2**20

Times = dict[str, list[tuple[float, float]]]  # wall and processor seconds of each part


def main() -> None:
    """Measure and report."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.mixed:
        mixed(options)
        return
    if options.stack:
        stacked(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            measured = measure_memory(Path(folder), options.width, options.memory, options.ranks[0])
            _report(
                f"lora_switch_memory_{options.width.replace(' ', '_')}", measured | {"machine": describe()}, keep=True
            )
            return
        unet = make_unet(WIDTHS[options.width])
        rows = []
        for dtype, rank in itertools.product(options.dtypes, options.ranks):
            rows.append(measure(unet, Path(folder), rank, dtype, options.runs))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        kept = None if options.no_copies else kept_weights(unet, Path(folder), options.runs)
    _print(rows, kept)
    result = {"width": options.width, "runs": options.runs, "rows": rows, "kept_weights": kept, "machine": describe()}
    _report("lora_switch", result, keep=options.width == "full")


def _report(name: str, result: dict[str, Any], *, keep: bool) -> None:
    result = {"benchmark": name} | result
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def measure(unet: UNet2DConditionModel, folder: Path, rank: int, dtype: str, runs: int) -> dict[str, Any]:
    """Time both ways on one network, which is first ours and then PEFT's."""
    paths = [
        write_lora(folder / f"{rank}-{dtype}-{i}.safetensors", unet, rank, getattr(torch, dtype), i) for i in (0, 1)
    ]
    row: dict[str, Any] = {"rank": rank, "file_dtype": dtype, "modules": sum(1 for _ in targets(unet))}
    row["ours"] = ours(unet, paths, runs)
    gc.collect()
    row["diffusers"] = theirs(unet, paths, runs)
    for unit in ("seconds", "cpu_seconds"):  # on a machine that does other work too, only the latter is a fair ratio
        mine, other = row["ours"][unit], row["diffusers"][unit]
        other["switch"] = round(sum(other[part] for part in ("unfuse", "unload", "read", "load", "fuse")), 3)
        row[f"ratio_switch_{unit}"] = round(other["switch"] / mine["switch_cached"], 1)
        row[f"ratio_switch_without_reading_{unit}"] = round(
            (other["switch"] - other["read"]) / mine["switch_cached"], 1
        )
        row[f"ratio_load_apply_restore_{unit}"] = round(other["switch"] / mine["load_apply_restore"], 1)
    for path in paths:
        path.unlink()
    return row


@torch.inference_mode()
def ours(unet: nn.Module, paths: list[Path], runs: int) -> dict[str, Any]:
    """Seconds of each part, and whether the weights came back bit for bit."""
    probe = _probe(unet)
    adapters = Adapters({"unet": unet})
    times: Times = {}

    def put_on(loras: Any) -> None:
        with adapters.active(loras):
            pass

    sets = [_timed(times, "read", partial(adapters.resolve, [LoraRef(str(path))])) for path in paths]
    _timed(times, "apply_first", partial(put_on, sets[0]))  # makes the copies of the model's own weights, too
    _timed(times, "switch_first", partial(put_on, sets[1]))
    for run in range(2 * runs):
        _timed(times, "switch_cached", partial(put_on, sets[run % 2]))
    for _ in range(runs):
        _timed(times, "restore", adapters.restore)
        _timed(times, "apply_again", partial(put_on, sets[0]))
    held = adapters.held_bytes
    adapters.clear()
    _whole_way(unet, paths, runs, times)
    assert all(torch.equal(a, b) for a, b in zip(probe, _probe(unet), strict=True)), "a weight did not come back"
    return _medians(times) | {f"{name}_mib": round(size / MIB) for name, size in held.items()}


def _whole_way(unet: nn.Module, paths: list[Path], runs: int, times: Times) -> None:
    """Read, put on, take off, with memory for one file and no set, so that every file is read and made ready anew."""
    adapters = Adapters({"unet": unet}, Budgets(parsed=paths[0].stat().st_size * 3 // 2, prepared=0))

    def load_apply_restore(path: Path) -> None:
        with adapters.active(adapters.resolve([LoraRef(str(path))])):
            pass
        adapters.restore()

    load_apply_restore(paths[1])  # makes the copies of the model's own weights
    for run in range(runs):
        _timed(times, "load_apply_restore", partial(load_apply_restore, paths[run % 2]))
    adapters.clear()


@torch.inference_mode()
def kept_weights(unet: nn.Module, folder: Path, runs: int) -> dict[str, Any] | None:
    """Time switches between two sets whose patched weights are kept; ``None`` where memory has no room for them."""
    size = sum(module.weight.nbytes for _, module in targets(unet))
    if (free_memory() or 0) < 3.5 * size:
        print("kept weights: not measured, too little memory is free", file=sys.stderr)
        return None
    adapters = Adapters({"unet": unet}, Budgets(prepared=2 * size + 64 * MIB))
    paths = [write_lora(folder / f"kept-{i}.safetensors", unet, 16, torch.float16, i) for i in (0, 1)]
    sets = [adapters.resolve([LoraRef(str(path))]) for path in paths]

    def put_on(loras: Any) -> None:
        with adapters.active(loras):
            pass

    for run in range(4):  # from a set's second time on its weights are kept
        put_on(sets[run % 2])
    times: Times = {}
    for run in range(2 * runs):
        _timed(times, "switch", partial(put_on, sets[run % 2]))
    held = adapters.held_bytes["prepared"]
    adapters.clear()
    return _medians(times) | {"prepared_mib": round(held / MIB)}


@torch.no_grad()
def theirs(unet: UNet2DConditionModel, paths: list[Path], runs: int) -> dict[str, Any]:
    """Seconds of each part of diffusers' and PEFT's way, and the share of weights that did not come back."""
    probe = _probe(unet)
    times: Times = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in range(runs):
            path = paths[run % 2]
            read = partial(StableDiffusionXLPipeline.lora_state_dict, path, unet_config=unet.config)
            state, alphas = _timed(times, "read", read)
            load = partial(StableDiffusionXLPipeline.load_lora_into_unet, state, alphas, unet, adapter_name="a")
            _timed(times, "load", load)
            del state, load
            _timed(times, "fuse", unet.fuse_lora)
            _timed(times, "unfuse", unet.unfuse_lora)
            _timed(times, "unload", unet.unload_lora)
    changed = [(a != b).float().mean().item() for a, b in zip(probe, _probe(unet), strict=True)]
    return _medians(times) | {"weights_not_restored": round(statistics.mean(changed), 4)}


def measure_memory(folder: Path, width: str, switches: int, rank: int) -> dict[str, Any]:
    """Resident memory after 10 and after more switches between four sets, and all taken off now and then."""
    unet = make_unet(WIDTHS[width])
    probe = _probe(unet)
    paths = [write_lora(folder / f"{i}.safetensors", unet, rank, torch.bfloat16, i) for i in range(4)]
    adapters = Adapters({"unet": unet}, Budgets(parsed=2**30, prepared=2**30))
    seen = {}
    start = time.perf_counter()
    for switch in range(1, switches + 1):
        loras = [LoraRef(str(paths[switch % 4]), 0.8)] if switch % 10 else []
        with adapters.active(adapters.resolve(loras)):
            pass
        if switch in (10, 30, 100, 300, 1000, switches):
            gc.collect()
            held = process_memory("VmRSS")
            seen[f"after_{switch}_mib"] = None if held is None else round(held / MIB, 1)
            print(f"after {switch} switches: {seen[f'after_{switch}_mib']} MiB", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    adapters.restore()
    back = all(torch.equal(a, b) for a, b in zip(probe, _probe(unet), strict=True))
    facts = {"width": width, "rank": rank, "sets": 4, "switches": switches, "seconds": round(seconds, 1)}
    return facts | {"every_bit_back": back} | seen


def _timed(times: Times, name: str, do: Callable[[], Any]) -> Any:
    start, cpu = time.perf_counter(), time.process_time()
    result = do()
    times.setdefault(name, []).append((time.perf_counter() - start, time.process_time() - cpu))
    return result


def _medians(times: Times) -> dict[str, Any]:
    """Medians of wall and processor time of each part."""
    units = enumerate(("seconds", "cpu_seconds"))
    return {
        unit: {name: round(statistics.median(value[i] for value in values), 3) for name, values in times.items()}
        for i, unit in units
    }


def _probe(unet: nn.Module) -> list[Tensor]:
    """Copies of every fortieth target, to see what came back."""
    return [module.weight.clone() for i, (_, module) in enumerate(_plain(unet)) if i % 40 == 0]


def _plain(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in targets(unet) if "lora_" not in name)


def _print(rows: list[dict[str, Any]], kept: dict[str, Any] | None) -> None:
    parts = ("read", "put on", "switch, first", "switch, cached", "take off", "whole way")
    table = Table("rank", "file", "way", "unit", *parts, "ratio of switch, way")
    for row in rows:
        for unit in ("seconds", "cpu_seconds"):
            ours, theirs = row["ours"][unit], row["diffusers"][unit]
            name = (str(row["rank"]), row["file_dtype"])
            names = ("read", "apply_first", "switch_first", "switch_cached", "restore", "load_apply_restore")
            mine = [ours[part] for part in names]
            switch, restore = theirs["switch"], theirs["unfuse"] + theirs["unload"]
            other = [theirs["read"], theirs["load"] + theirs["fuse"], switch, switch, restore, switch]
            ratio = f"{row[f'ratio_switch_{unit}']} {row[f'ratio_load_apply_restore_{unit}']}"
            table.add_row(*name, "ours", unit, *(f"{value:.2f}" for value in mine), ratio)
            table.add_row(*name, "diffusers", unit, *(f"{value:.2f}" for value in other), "")
    table.caption = f"between sets whose patched weights are kept: {kept}"
    Console(file=sys.stdout, width=140).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], help="number formats of the files")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each part")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", choices=WIDTHS, default="full", help="any but the full one writes no result")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="measure memory over N switches instead")
    parser.add_argument("--no-copies", action="store_true", help="leave out the sets whose patched weights are kept")
    parser.add_argument("--mixed", action="store_true", help="measure mixed batches instead")
    parser.add_argument("--stack", type=int, default=0, metavar="N", help="measure switches of N LoRAs at once instead")
    parser.add_argument("--rows", type=int, default=4, help="rows of a mixed batch")
    parser.add_argument("--side", type=int, default=1024, help="pixels of a mixed batch's pictures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
