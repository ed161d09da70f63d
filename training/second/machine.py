"""The machine a step runs on: which device, and what is fast there. Knows torch's switches, nothing of the training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import PreTrainedModel


def device(wanted: str | None = None) -> torch.device:
    """The device asked for, else the GPU if there is one."""
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def settle(place: torch.device) -> None:
    """Fast arithmetic where its loss does not matter."""
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_flush_denormal(True)


def suit(unet: UNet2DConditionModel, place: torch.device) -> None:
    """Attention and memory layout for the device: on a CPU plain attention has the faster backward pass.

    In training mode diffusers copies what goes into shortcuts out of that layout, and gradients with it: an eighth of
    a step at 64x64 latents. Nothing else in a UNet asks for the mode, since there is no dropout.
    """
    unet.eval()
    unet.set_attn_processor(AttnProcessor2_0() if place.type == "cuda" else AttnProcessor())
    unet.to(memory_format=torch.channels_last)


def suit_readers(encoders: Iterable[PreTrainedModel], place: torch.device) -> None:
    """The same for text encoders: the fused attention's backward pass takes a twelfth of a small step on a CPU."""
    for encoder in encoders:
        encoder.set_attn_implementation("sdpa" if place.type == "cuda" else "eager")
