"""SDXL's UNet at real and smaller widths with random weights, and LoRA files for it, for the benchmarks of LoRAs.

Knows names and shapes. Knows nothing of how LoRAs are applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from benchmarks.full_size import UNET

WIDTHS = {
    "full": UNET,
    "half": UNET | {"block_out_channels": (160, 320, 640), "attention_head_dim": (5, 5, 10)},
    "a tenth": UNET | {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)},
}
NOISE = 4 * 2**20  # random numbers, repeated


def make_unet(config: dict[str, Any], device: str = "cpu") -> UNet2DConditionModel:
    """Build a UNet in bfloat16 with random weights of a trained model's size, fast: one random block, repeated."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(torch.bfloat16)
    unet.to_empty(device=device).requires_grad_(False).eval()
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(device)
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
