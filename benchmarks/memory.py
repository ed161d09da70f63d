"""Does memory stay flat? ``python -m benchmarks.memory`` makes 200 pictures in one process and plots what it holds.

The physics: activations of a step come and go, and what stays is the weights, the pristine copies under the LoRAs that
are on, and the caches (prompts, parsed LoRAs), all of which are bounded. So after every kind of request was seen once,
the resident memory must not grow with the number of pictures. The requests go round all modes, samplers, sizes, LoRA
sets and new prompts, and every tenth is cancelled half way.

Prints a summary, then one line of JSON, also written to ``benchmarks/results/memory.json``; the plot goes to
``docs/memory.png``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from benchmarks.machine import describe
from impasto.engine.engine import Engine
from impasto.engine.memory import process_memory
from impasto.engine.samplers import SAMPLERS
from impasto.types import GenerationRequest, ImageReady, LoraRef

RESULT = Path(__file__).parent / "results" / "memory.json"
PLOT = Path("docs/memory.png")
MIB = 2**20
SETTLED = 40  # generations after which every kind was seen
RANK = 8


def main() -> None:
    """Generate, watch, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--model", default="builtin")
    options = parser.parse_args()
    engine = Engine.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        loras = [make_lora(engine, Path(folder) / f"{seed}.safetensors", seed) for seed in range(3)]
        start = time.perf_counter()
        held = [run(engine, request, cancel=i % 10 == 9) for i, request in enumerate(kinds(loras, options.generations))]
        seconds = time.perf_counter() - start
    settled = held[SETTLED:]
    half = len(settled) // 2
    growth = sum(settled[half:]) / len(settled[half:]) - sum(settled[:half]) / half
    result: dict[str, Any] = {
        "benchmark": "memory",
        "model": options.model,
        "generations": options.generations,
        "seconds": round(seconds, 1),
        "mib_first": round(held[0]),
        "mib_settled": round(settled[0]),
        "mib_last": round(held[-1]),
        "mib_most": round(max(held)),
        "mib_growth_second_half": round(growth, 1),
        "machine": describe(),
    }
    plot(held, options.generations)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.generations} generations: {held[0]:.0f} MiB after the first, {held[-1]:.0f} after the last;")
    print(f"between the halves after the first {SETTLED}: {growth:+.1f} MiB; the plot is {PLOT}")
    print(json.dumps(result))


def kinds(loras: list[Path], count: int) -> Iterator[GenerationRequest]:
    """Requests of every kind in turn, none twice the same."""
    picture = Image.linear_gradient("L").convert("RGB")
    mask = Image.radial_gradient("L").point(lambda value: 255 * (value < 120))
    sets = [(), (LoraRef(str(loras[0]), 0.8),), (LoraRef(str(loras[1])), LoraRef(str(loras[2]), 0.5))]
    sizes = [(256, 256), (320, 256), (256, 384)]
    for i, sampler in zip(range(count), itertools.cycle(SAMPLERS), strict=False):
        width, height = sizes[i % 3]
        request = GenerationRequest(
            f"picture number {i} of a fox", width=width, height=height, num_inference_steps=3 + i % 4, seed=i,
            scheduler=sampler, guidance_scale=(0, 5)[i % 2], loras=sets[i // 4 % 3], num_images=1 + i % 2,
            reuse_features=1 + i % 3,
        )  # fmt: skip
        if i % 4 in (2, 3):
            request = replace(request, image=picture, strength=0.7, mask_image=mask if i % 4 == 3 else None)
        yield request


def run(engine: Engine, request: GenerationRequest, *, cancel: bool) -> float:
    """Run one request (or half of it) and return the memory held afterwards, in MiB."""
    for event in engine.generate(request, preview_every=2):
        if cancel or isinstance(event, ImageReady):
            break
    gc.collect()
    held = process_memory("VmRSS")
    if held is None:
        raise SystemExit("memory: this system does not tell what a process holds")
    return held / MIB


def make_lora(engine: Engine, path: Path, seed: int) -> Path:
    """Write a small random LoRA over every attention projection of the UNet."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in engine._model.base.unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            out, inner = module.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.02
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    save_file(tensors, path)
    return path


def plot(held: list[float], generations: int) -> None:
    """Draw memory over generations."""
    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, generations + 1), held, linewidth=1.5)
    axes.axvline(SETTLED, color="grey", linestyle=":", label="every kind of request seen")
    axes.set_xlabel("generations")
    axes.set_ylabel("resident memory, MiB")
    axes.set_ylim(0, max(held) * 1.15)
    axes.set_title("All modes, samplers, sizes and LoRA sets in turn; every tenth request cancelled")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT)


if __name__ == "__main__":
    main()
