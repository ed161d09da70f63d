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
import math
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
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.full_size import UNET
from benchmarks.machine import describe
from impasto.engine.memory import free_memory, process_memory
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.types import LoraRef

RESULTS = Path(__file__).parent / "results"
WIDTHS = {
    "full": UNET,
    "half": UNET | {"block_out_channels": (160, 320, 640), "attention_head_dim": (5, 5, 10)},
    "a tenth": UNET | {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)},
}
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


def make_unet(config: dict[str, Any], device: str = "cpu") -> UNet2DConditionModel:
    """Build a UNet in bfloat16 with random weights of a trained model's size, fast: one random block, repeated."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(torch.bfloat16)
    unet.to_empty(device=device).requires_grad_(False).eval()
    noise = torch.randn(4 * MIB, generator=torch.Generator().manual_seed(0)).to(device)
    for parameter in unet.parameters():
        repeats = math.ceil(parameter.numel() / len(noise))
        fan_in = parameter.numel() / len(parameter)
        values = noise.repeat(repeats)[: parameter.numel()].view(parameter.shape)
        parameter.copy_(values / math.sqrt(fan_in) if parameter.ndim > 1 else torch.ones_like(values))
    return unet


def targets(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that kohya's trainer trains by default: those of the attention blocks."""
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and ".attentions." in name:
            yield name, module


def write_lora(path: Path, unet: nn.Module, rank: int, dtype: torch.dtype, seed: int) -> Path:
    """Write a file under kohya's names, alpha half the rank, with deltas a few hundredths of the weights' size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in targets(unet):
        flat = f"lora_unet_{name.replace('.', '_')}"
        down = torch.randn(rank, module.in_features, generator=generator) / math.sqrt(module.in_features)
        tensors[f"{flat}.lora_down.weight"] = down.to(dtype)
        tensors[f"{flat}.lora_up.weight"] = (torch.randn(module.out_features, rank, generator=generator) * 0.02).to(
            dtype
        )
        tensors[f"{flat}.alpha"] = torch.tensor(rank / 2, dtype=dtype)
    save_file(tensors, path)
    return path


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


@torch.inference_mode()
def stacked(options: argparse.Namespace) -> None:
    """Switch between two sets of several LoRAs each, on a GPU if there is one, and say how long the floor is.

    The floor is memory: every patched weight is read from its own values and written once. Its speed is measured by
    copying one block of the same size as all of them together.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = make_unet(WIDTHS["a tenth" if device == "cpu" else options.width], device)
    size = sum(module.weight.nbytes for _, module in targets(unet))
    for rank in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            count = 2 * options.stack
            paths = [write_lora(Path(folder) / f"{i}.safetensors", unet, rank, torch.bfloat16, i) for i in range(count)]
            adapters = Adapters({"unet": unet}, Budgets(prepared=2**32))
            halves = paths[: options.stack], paths[options.stack :]
            sets = [adapters.resolve([LoraRef(str(path), 0.5) for path in half]) for half in halves]
            times = [_switch_seconds(adapters, sets[run % 2], device) for run in range(2 * options.runs + 4)]
            adapters.clear()
        block = torch.empty(size, dtype=torch.uint8, device=device)
        other = torch.empty_like(block)
        copies = []
        for _ in range(options.runs + 1):
            start = _now(device)
            other.copy_(block)
            copies.append(_now(device) - start)
        figures: dict[str, Any] = {"device": device, "rank": rank, "loras": options.stack, "weights_mib": size >> 20}
        figures |= {"first": times[0], "second": times[1], "switch": statistics.median(times[4:])}
        figures |= {"copy_of_all_weights": min(copies[1:])}
        print(json.dumps({name: round(v, 5) if isinstance(v, float) else v for name, v in figures.items()}), flush=True)


@torch.inference_mode()
def mixed(options: argparse.Namespace) -> None:
    """A batch of rows with a LoRA each: unmerged low-rank paths, against a switch for each row every k steps.

    Unmerged pays two thin products a module and step; switching pays the switch, and calls of one row for the batch's.
    The crossover is the least k from which switching is cheaper.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = make_unet(WIDTHS["a tenth" if device == "cpu" else options.width], device)
    for rank in options.ranks:
        step = {rows: _step_seconds(unet, rows, options.side, options.runs, device) for rows in (1, options.rows)}
        with tempfile.TemporaryDirectory() as folder:
            paths = [write_lora(Path(folder) / f"{i}.safetensors", unet, rank, torch.bfloat16, i) for i in (0, 1)]
            adapters = Adapters({"unet": unet})
            sets = [adapters.resolve([LoraRef(str(path))]) for path in paths]
            switches = [_switch_seconds(adapters, sets[run % 2], device) for run in range(2 * options.runs + 2)][2:]
            adapters.clear()
        hooks = [module.register_forward_hook(_own_path(module, options.rows, rank)) for _, module in targets(unet)]
        unmerged = _step_seconds(unet, options.rows, options.side, options.runs, device)
        for hook in hooks:
            hook.remove()
        switch = statistics.median(switches)
        saved = unmerged - options.rows * step[1]  # a step of all rows: what calls of one row each save
        figures = {
            "device": device,
            "rank": rank,
            "rows": options.rows,
            "step_of_one_row": step[1],
            "step_of_all_rows_one_lora": step[options.rows],
            "step_of_all_rows_unmerged": unmerged,
            "switch": switch,
            "switching_wins_from_k": math.ceil(options.rows * switch / saved) if saved > 0 else None,
        }
        print(json.dumps({name: round(v, 5) if isinstance(v, float) else v for name, v in figures.items()}))


def _own_path(module: nn.Linear, rows: int, rank: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    """A hook that adds each row's own low-rank product; a guided row is two of the batch."""
    like = module.weight
    down = torch.randn(2 * rows, module.in_features, rank, dtype=like.dtype, device=like.device)
    up = torch.randn(2 * rows, rank, module.out_features, dtype=like.dtype, device=like.device) * 0.01

    def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.baddbmm(output, torch.bmm(inputs[0], down), up)

    return add


def _step_seconds(unet: nn.Module, rows: int, side: int, runs: int, device: str) -> float:
    """Median of a UNet call for guided rows."""
    batch, kind = 2 * rows, {"dtype": torch.bfloat16, "device": device}
    added = {"text_embeds": torch.randn(batch, 1280, **kind), "time_ids": torch.full((batch, 6), 512.0, **kind)}  # type: ignore[call-overload]
    inputs = (torch.randn(batch, 4, side // 8, side // 8, **kind), torch.full((batch,), 500, device=device))  # type: ignore[call-overload]
    tokens = torch.randn(batch, 77, 2048, **kind)  # type: ignore[call-overload]
    times = []
    for _ in range(runs + 1):
        start = _now(device)
        unet(*inputs, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)
        times.append(_now(device) - start)
    return statistics.median(times[1:])


def _switch_seconds(adapters: Adapters, loras: Any, device: str) -> float:
    start = _now(device)
    with adapters.active(loras):
        return _now(device) - start


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
