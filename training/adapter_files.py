"""The shipped LoRA files: kohya's names in the original block layout, half precision, what they say of themselves.

Knows names, metadata and the card beside the files. Does not know how factors are learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from impasto.lora.original import original_names
from training.places import BUILTIN

LORAS = BUILTIN / "loras"
LIMIT_BYTES = 4_000_000

Factors = dict[str, tuple[Tensor, Tensor]]  # diffusers' module name: down (rank, in, *kernel), up (out, rank, *1)


@dataclass(frozen=True)
class Card:
    """What a file says of itself."""

    title: str
    trigger: str
    description: str


CARDS = {
    "pixel-art": Card(
        "Impasto pixel art",
        "pixel art",
        "Pictures as squares of 16 px in few colours, with a dark outline.",
    ),
    "line-art": Card(
        "Impasto line art",
        "line art",
        "A black contour around a few greys, on white; the background asked for is left out.",
    ),
}

README = """# LoRAs for the built-in model

| file | trigger words | what it does |
|---|---|---|
{rows}

In a request: `"loras": [{{"path": "pixel-art", "scale": 1}}]`. At scale 0 nothing changes and 1 is what was learned; at
0.5 pixel art is faint and line art already plain; at 2 the look is exaggerated and shapes suffer. Both can be on at
once, at 1 or less. The trigger words may be left out: the file alone makes the look.

They fit the built-in model only, and teach it no new subjects.

Each is a LoRA of rank {rank} over the linear layers of the UNet's attention blocks and the convolutions of its residual
blocks, with kohya's names (`lora_unet_input_blocks_4_1_...`), in float16. They were trained on Fluent Emoji drawings
redrawn in the two looks, and carry the same licences as the model: Impasto's (Apache-2.0), and for the drawings MIT,
Copyright (c) Microsoft Corporation (`../NOTICE`). `python -m training.adapters` makes them again.
"""


def metadata(card: Card, name: str, rank: int, alpha: float, steps: int) -> dict[str, str]:
    """The header, in kohya's words and in those of modelspec 1.0.1."""
    return {
        "ss_base_model_version": "impasto-builtin",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)}),
        "ss_output_name": name,
        "ss_steps": str(steps),
        "ss_tag_frequency": json.dumps({name: {card.trigger: 1}}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": card.title,
        "modelspec.description": f"{card.description} For Impasto's built-in model only.",
        "modelspec.trigger_phrase": card.trigger,
        "modelspec.tags": card.trigger,
        "modelspec.license": "Apache-2.0; drawings: MIT, Copyright (c) Microsoft Corporation",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
    }


def tensors(factors: Factors, alpha: float) -> dict[str, Tensor]:
    """The factors under kohya's names of the original layout, each with its alpha."""
    flat = {module: original.replace(".", "_") for original, module in original_names(list(factors))}
    named = {}
    for module, (down, up) in factors.items():
        stem = f"lora_unet_{flat[module]}"
        named[f"{stem}.lora_down.weight"] = down.to(torch.float16).contiguous()
        named[f"{stem}.lora_up.weight"] = up.to(torch.float16).contiguous()
        named[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    return named


def write_lora(path: Path, factors: Factors, card: Card, alpha: float, steps: int) -> int:
    """Write a file, whole or not at all; returns its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rank = len(next(iter(factors.values()))[0])
    beside = path.with_suffix(".tmp")
    save_file(tensors(factors, alpha), beside, metadata(card, path.stem, rank, alpha, steps))
    size = beside.stat().st_size
    if size > LIMIT_BYTES:
        raise ValueError(f"{path.name} has {size} bytes, more than {LIMIT_BYTES}")
    beside.chmod(0o644)
    beside.replace(path)
    return size


def rows(cards: Mapping[str, Card]) -> str:
    """The table of a README beside the files, without its head."""
    return "\n".join(f"| `{name}.safetensors` | {card.trigger} | {card.description} |" for name, card in cards.items())


def write_card(folder: Path, rank: int) -> None:
    """The README beside the files."""
    (folder / "README.md").write_text(README.format(rows=rows(CARDS), rank=rank))
