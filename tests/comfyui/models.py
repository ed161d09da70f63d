"""A small SDXL with random weights, as ComfyUI loads it and as the networks of the conformance suite: the same bits."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.comfyui.inside import enter_comfyui
from tests.parity.lora.networks import Networks, networks_of
from tests.parity.test_checkpoint import base_unet as wide_unet
from tests.parity.test_checkpoint import clip_config
from tests.parity.test_checkpoint import vae as wide_vae
from tests.random_sdxl import IMAGE_CHANNELS, WIDTHS, base_unet, character_tokenizer, random_vae, seeded, text_config
from tests.single_file import base_layout, save_single_file

LAYERS = 3  # of a text encoder: SDXL reads the last but one, and ComfyUI wants one below that


@dataclass(frozen=True)
class Loaded:
    """What ComfyUI made of a checkpoint, and the networks that it was written from."""

    model: Any
    clip: Any
    networks: Networks


@cache
def small_networks() -> Networks:
    """A base's UNet and text encoders with SDXL's names, float32."""

    def text(width: int) -> Any:
        config = text_config(width, character_tokenizer())
        config.num_hidden_layers = LAYERS
        return config

    return networks_of(
        {
            "unet": seeded(0, lambda: base_unet(IMAGE_CHANNELS)),
            "text_encoder": seeded(1, lambda: CLIPTextModel(text(WIDTHS[0]))),
            "text_encoder_2": seeded(2, lambda: CLIPTextModelWithProjection(text(WIDTHS[1]))),
        }
    )


def small_checkpoint() -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, its VAE too, in the original layout."""
    enter_comfyui()
    from tests.comfyui.small_sdxl import whole_vocabulary

    modules = small_networks().modules
    parts = (modules["unet"], seeded(0, random_vae), modules["text_encoder"], modules["text_encoder_2"])
    return {key: tensor.clone() for key, tensor in whole_vocabulary(base_layout(*parts)).items()}


def save_small_checkpoint(path: Path) -> Path:
    """Write a checkpoint that our engine reads as well: SDXL's 64 channels a head, and few of everything else."""

    def text(activation: str) -> Any:
        config = clip_config(activation)
        config.num_hidden_layers = LAYERS
        return config

    first = seeded(1, lambda: CLIPTextModel(text("quick_gelu")))
    second = seeded(2, lambda: CLIPTextModelWithProjection(text("gelu")))
    return save_single_file(path, seeded(0, wide_unet), seeded(0, wide_vae), first, second)


def load_small(dtype: torch.dtype = torch.float32) -> Loaded:
    """Have ComfyUI load the checkpoint, its networks in ``dtype``."""
    tensors = small_checkpoint()
    model, clip, _, _ = enter_comfyui().load_state_dict_guess_config(
        tensors, output_vae=False, model_options={"dtype": dtype}, te_model_options={"dtype": dtype}
    )
    return Loaded(model, clip, small_networks())
