"""Models to time, by name: ``builtin``, ``reduced``, ``full`` (random weights), or a folder. Knows no clocks.

Speed does not depend on what weights say, so a network of SDXL's own sizes with random ones is as good to time as the
real one, and needs no download. ``full`` is SDXL (3.47 billion weights, 6.9 GB in bfloat16); ``reduced`` has its depth
at a tenth of its width, for machines where a full step takes minutes. Both are written as diffusers folders, which we
and diffusers load alike.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.full_size import CLIP_G, CLIP_L, UNET, VAE
from impasto.models.catalog import BUILTIN_FOLDER

NOISE: Final = 2**22  # random numbers that a weight repeats
END_TOKEN: Final = 49407
INDEX: Final = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TENTH: Final = {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)}
SIZES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "full": {"unet": UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "reduced": {
        "unet": UNET | TENTH | {"cross_attention_dim": 208, "projection_class_embeddings_input_dim": 128 + 6 * 256},
        "vae": VAE | {"block_out_channels": (32, 32, 64, 64)},
        "text_encoder": CLIP_L
        | {"hidden_size": 80, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 2},
        "text_encoder_2": CLIP_G
        | {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "projection_dim": 128,
        },
    },
}


def model_folder(name: str, cache: Path) -> str:
    """Return what ``Engine.load`` takes for a model's name; random ones are written below ``cache`` the first time."""
    if name not in SIZES:
        return name
    folder = cache / name
    if not (folder / "model_index.json").exists():
        write_model(name, folder)
    return str(folder)


def write_model(size: str, folder: Path) -> Path:
    """Write a model of ``SIZES`` in bfloat16 as a diffusers folder; the index comes last, so a folder is whole."""
    configs = SIZES[size]
    makers: dict[str, Callable[[], nn.Module]] = {
        "unet": lambda: UNet2DConditionModel(**configs["unet"]),
        "vae": lambda: AutoencoderKL(**configs["vae"], force_upcast=False, scaling_factor=0.13025),
        "text_encoder": lambda: CLIPTextModel(_text(configs["text_encoder"], "quick_gelu")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(_text(configs["text_encoder_2"], "gelu")),
    }
    for part, make in makers.items():
        network: Any = filled(make)
        network.save_pretrained(folder / part)
        del network
    for tokenizer in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUILTIN_FOLDER / tokenizer, folder / tokenizer, dirs_exist_ok=True)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=1) + "\n")
    return folder


def filled(make: Callable[[], nn.Module], device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Build a network with random weights of a trained one's size, fast: one random block, repeated."""
    with torch.device("meta"):
        network = make().to(dtype)
    network.to_empty(device=device).requires_grad_(False).eval()
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))  # norms pass, biases are zero
            continue
        repeats = math.ceil(parameter.numel() / len(noise))
        values = noise.repeat(repeats)[: parameter.numel()].view(parameter.shape)
        parameter.copy_(values / math.sqrt(parameter.numel() / len(parameter)))
    for module in network.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor):
            ids.copy_(torch.arange(ids.shape[-1]).expand(ids.shape))
    return network


def _text(config: dict[str, Any], activation: str) -> CLIPTextConfig:
    special = {"bos_token_id": END_TOKEN - 1, "eos_token_id": END_TOKEN, "pad_token_id": 1}
    return CLIPTextConfig(**config, **special, hidden_act=activation, vocab_size=END_TOKEN + 1)
