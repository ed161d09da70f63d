"""Does a full-size SDXL fit and run here, from one file? ``python -m benchmarks.full_size``.

The physics: 3.47 billion weights, two bytes each in bfloat16. They are mapped from the file, so loading reads only
the header, and each weight comes into memory when it is first used; on a CPU one step at 512 pixels with guidance
reads them all once and is limited by arithmetic. The weights here are random: sizes, shapes and names are SDXL's own,
the picture is noise.

Writes a checkpoint in the original layout to a temporary folder (``--keep FILE`` for another place, and to keep it),
then loads it and makes a picture in a fresh process, whose peak memory is measured. Prints a table, then one line of
JSON, which is also written to ``benchmarks/results/full_size.json``; ``--load-only`` makes no picture and only prints.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import ROOT, describe

RESULT = Path(__file__).parent / "results" / "full_size.json"
SIDE, STEPS, GUIDANCE = 512, 1, 5.0
BYTES = 2  # of a bfloat16
UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def main() -> None:
    """Write, load in a fresh process, report."""
    options = _options()
    if options.run is not None:
        print(json.dumps(run(options.run, options.load_only)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "full-size.safetensors"
        seconds_to_write = write(path)
        row = {"seconds_to_write": round(seconds_to_write, 1), "file_gb": round(path.stat().st_size / 1e9, 3)}
        row |= _in_fresh_process(path, options.load_only)
    setting = {"side": SIDE, "steps": STEPS, "guidance": GUIDANCE, "dtype": "bfloat16", "device": "cpu"}
    result = {"benchmark": "full_size", **setting, "row": row, "machine": describe()}
    _print(row)
    if not options.load_only:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def write(path: Path) -> float:
    """Write a full-size SDXL with random weights as one file, tensor by tensor; return the seconds it took.

    Source: the safetensors format (8 bytes of header length, JSON, data in the header's order).
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    tensors = _layout()
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + BYTES * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            _write_random(file, name, tensor)
    return time.perf_counter() - start


def _layout() -> dict[str, torch.Tensor]:
    """SDXL's tensors under their original names: shapes without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tests.single_file import base_layout

    with torch.device("meta"):
        return base_layout(
            UNet2DConditionModel(**UNET),
            AutoencoderKL(**VAE),
            CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
        )


def _write_random(file: BinaryIO, name: str, tensor: torch.Tensor) -> None:
    """Write weights that keep activations near one: norms pass, biases are zero, matrices are scaled by fan-in."""
    if tensor.ndim < 2:
        data = torch.full(tensor.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    else:
        std = 1 / math.sqrt(tensor.numel() / tensor.shape[0])
        data = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, std)
    file.write(data.reshape(-1).view(torch.int16).numpy().data)


def run(path: Path, load_only: bool) -> dict[str, float]:
    """Load the file and make one picture; return the seconds of each."""
    from impasto.engine.engine import Engine
    from impasto.types import GenerationRequest, ImageReady

    start = time.perf_counter()
    engine = Engine.load(str(path), device="cpu", dtype="bfloat16")
    seconds = {"seconds_to_load": round(time.perf_counter() - start, 2)}
    if load_only:
        return seconds
    request = GenerationRequest(
        "a red fox", width=SIDE, height=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=7
    )
    start = time.perf_counter()
    pictures = [event.image for event in engine.generate(request) if isinstance(event, ImageReady)]
    assert [picture.size for picture in pictures] == [(SIDE, SIDE)]
    return seconds | {"seconds_to_encode_step_decode": round(time.perf_counter() - start, 1)}


def _in_fresh_process(path: Path, load_only: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.full_size", "--run", str(path), *(["--load-only"] * load_only)]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest child, in KiB on Linux
    return json.loads(output.splitlines()[-1]) | {"peak_memory_gib": round(peak / 2**20, 2)}  # type: ignore[no-any-return]


def _print(row: dict[str, float]) -> None:
    table = Table("measure", "value")
    for name, value in row.items():
        table.add_row(name.replace("_", " "), str(value))
    Console(file=sys.stdout).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the checkpoint here and leave it")
    parser.add_argument("--load-only", action="store_true", help="make no picture, and write no result")
    parser.add_argument("--run", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # what the fresh process does
    return parser.parse_args()


if __name__ == "__main__":
    main()
