"""Switches of several LoRAs at once, and batches of rows with a LoRA each: on a GPU if there is one.

Knows adapters and seconds. Part of ``python -m benchmarks.lora_switch`` (``--stack``, ``--mixed``), which only prints.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lora_networks import WIDTHS, make_unet, targets, write_lora
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.types import LoraRef


@torch.inference_mode()
def stacked(options: argparse.Namespace) -> None:
    """Switch between two sets of several LoRAs each, on a GPU if there is one, and say how long the floor is.

    The floor is memory: every patched weight is read from its own values and written once. Its speed is measured by
    copying one block of the same size as all of them together.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = make_unet(WIDTHS["a tenth" if device == "cpu" else options.width], device)
    size = sum(module.weight.nbytes for _, module in targets(unet))
    floor = _copy_seconds(size, options.runs, device)
    for rank, strengths in itertools.product(options.ranks, ("equal", "different")):
        times = _stacked_seconds(unet, rank, options.stack, options.runs, device, strengths == "different")
        figures: dict[str, Any] = {"device": device, "rank": rank, "loras": options.stack, "strengths": strengths}
        figures |= {"first": times[0], "second": times[1], "switch": statistics.median(times[4:])}
        figures |= {"weights_mib": size >> 20, "copy_of_all_weights": floor}
        print(json.dumps({name: round(v, 5) if isinstance(v, float) else v for name, v in figures.items()}), flush=True)


def _stacked_seconds(
    unet: nn.Module, rank: int, count: int, runs: int, device: str, different: bool
) -> Sequence[float]:
    """Switches between two sets of so many LoRAs: the first two prepare, the next two may keep, the rest repeat.

    LoRAs of one strength share one scale outside their product; others have it in their factors, which then need more
    digits.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_lora(Path(folder) / f"{i}.safetensors", unet, rank, torch.bfloat16, i) for i in range(2 * count)]
        adapters = Adapters({"unet": unet}, Budgets(prepared=2**32))
        refs = [LoraRef(str(path), 0.3 + 0.07 * (i % count) if different else 0.5) for i, path in enumerate(paths)]
        sets = [adapters.resolve(refs[:count]), adapters.resolve(refs[count:])]
        times = [_switch_seconds(adapters, sets[run % 2], device) for run in range(2 * runs + 4)]
        adapters.clear()
    return times


def _copy_seconds(size: int, runs: int, device: str) -> float:
    """Seconds for a copy of so many bytes."""
    block = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    copies = []
    for _ in range(runs + 1):
        start = _now(device)
        other.copy_(block)
        copies.append(_now(device) - start)
    return min(copies[1:])


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
