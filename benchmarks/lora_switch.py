"""What does it cost to put LoRAs on and off a full-size SDXL? ``python -m benchmarks.lora_switch``.

The physics: the 722 linears of SDXL's attention blocks hold 2.2 billion weights, 4.4 GB in bfloat16. A switch reads
the model's own weights and writes the patched ones, 8.8 GB through memory, and multiplies two thin matrices for each:
4.4 billion multiplications for every unit of rank. Ours is one pass, from own weights straight to patched ones. PEFT
takes the old LoRA off by subtracting it (a product and a pass), loads the new one (a pass over the modules), and adds
it (a product, a rounding and a pass), and what it subtracted is not quite what it had added.

Real names and widths, random weights, the same network for both in turn. Files are in bfloat16, where the model's own
format can hold the factors, and in float16, where it cannot and we add in float32 instead. Prints tables, then one line
of JSON, which is also written to ``benchmarks/results/lora_switch.json``. ``--mixed`` measures instead, on a GPU if
there is one, whether a batch of rows with a LoRA each is better run unmerged, and only prints.
"""

from __future__ import annotations

import argparse
import gc
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
from impasto.engine.memory import process_memory
from impasto.lora.apply import Adapters
from impasto.types import LoraRef

RESULT = Path(__file__).parent / "results" / "lora_switch.json"
NARROW = UNET | {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)}  # a tenth of the width
MIB = 2**20

Times = dict[str, list[tuple[float, float]]]  # wall and processor seconds of each part


def main() -> None:
    """Measure and report."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.mixed:
        mixed(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        memory = measure_memory(Path(folder))  # first, while the process has held nothing large
        unet = make_unet(NARROW if options.narrow else UNET)
        rows = [
            measure(unet, Path(folder), rank, dtype, options.runs) for dtype in options.dtypes for rank in options.ranks
        ]
    result = {
        "benchmark": "lora_switch",
        "width": "a tenth" if options.narrow else "full",
        "runs": options.runs,
        "rows": rows,
        "memory": memory,
        "machine": describe(),
    }
    _print(rows, memory)
    if not options.narrow:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
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
        row[f"ratio_first_use_{unit}"] = round(other["switch"] / (mine["read"] + mine["switch_first"]), 1)
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
    adapters.restore()
    assert all(torch.equal(a, b) for a, b in zip(probe, _probe(unet), strict=True)), "a weight did not come back"
    adapters.clear()
    return _medians(times) | {f"{name}_mib": round(size / MIB) for name, size in held.items()}


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


def measure_memory(folder: Path) -> dict[str, Any]:
    """Resident memory after 10 and after 1,000 switches between four sets, at a tenth of the width."""
    unet = make_unet(NARROW)
    paths = [write_lora(folder / f"narrow-{i}.safetensors", unet, 16, torch.float16, i) for i in range(4)]
    adapters = Adapters({"unet": unet})
    seen = {}
    for switch in range(1, 1001):
        with adapters.active(adapters.resolve([LoraRef(str(paths[switch % 4]), 0.8)])):
            pass
        if switch in (10, 100, 1000):
            gc.collect()
            held = process_memory("VmRSS")
            seen[f"after_{switch}_mib"] = None if held is None else round(held / MIB, 1)
    return {"width": "a tenth", "sets": 4, **seen}


@torch.inference_mode()
def mixed(options: argparse.Namespace) -> None:
    """A batch of rows with a LoRA each: unmerged low-rank paths, against a switch for each row every k steps.

    Unmerged pays two thin products a module and step; switching pays the switch, and calls of one row for the batch's.
    The crossover is the least k from which switching is cheaper.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = make_unet(NARROW if options.narrow or device == "cpu" else UNET, device)
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


def _print(rows: list[dict[str, Any]], memory: dict[str, Any]) -> None:
    parts = ("read", "load + apply", "switch, first", "switch, cached", "restore")
    table = Table("rank", "file", "way", "unit", *parts, "ratio")
    for row in rows:
        for unit in ("seconds", "cpu_seconds"):
            ours, theirs = row["ours"][unit], row["diffusers"][unit]
            name = (str(row["rank"]), row["file_dtype"])
            mine = [ours[part] for part in ("read", "apply_first", "switch_first", "switch_cached", "restore")]
            restore = theirs["unfuse"] + theirs["unload"]
            other = [theirs["read"], theirs["load"] + theirs["fuse"], theirs["switch"], theirs["switch"], restore]
            ratio = str(row[f"ratio_switch_{unit}"])
            table.add_row(*name, "ours", unit, *(f"{value:.2f}" for value in mine), ratio)
            table.add_row(*name, "diffusers", unit, *(f"{value:.2f}" for value in other), "")
    table.caption = f"memory of 1,000 switches at a tenth of the width: {memory}"
    Console(file=sys.stdout, width=140).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], help="number formats of the files")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each part")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--narrow", action="store_true", help="a tenth of the width, and write no result")
    parser.add_argument("--mixed", action="store_true", help="measure mixed batches instead")
    parser.add_argument("--rows", type=int, default=4, help="rows of a mixed batch")
    parser.add_argument("--side", type=int, default=1024, help="pixels of a mixed batch's pictures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
