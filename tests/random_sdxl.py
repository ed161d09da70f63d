"""Tiny SDXL models with random weights, saved as diffusers folders: real classes and names, each loads in a second.

The base, the inpainting model and the refiner of one seed have equal VAEs and equal second text encoders, as the real
ones have, so that a refiner can run with the base's. Knows nothing of our loaders.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WINDOW = 77
START, END = "<|startoftext|>", "<|endoftext|>"
WIDTHS = (16, 24)  # of the two text encoders
TIME_WIDTH = 8  # of each size id's embedding
IMAGE_CHANNELS, INPAINT_CHANNELS = 4, 9  # inpainting adds a mask and the masked picture's latents


def save_random_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a base model and return its folder."""
    pipeline = StableDiffusionXLPipeline(
        **both_encoders(seed),
        unet=seeded(seed, lambda: base_unet(IMAGE_CHANNELS)),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return _saved(pipeline, folder)


def save_random_inpaint(folder: Path, seed: int = 0) -> Path:
    """Write an inpainting model (nine channels in) and return its folder."""
    pipeline = StableDiffusionXLInpaintPipeline(
        **both_encoders(seed),
        unet=seeded(seed, lambda: base_unet(INPAINT_CHANNELS)),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return _saved(pipeline, folder)


def save_random_refiner(folder: Path, seed: int = 0) -> Path:
    """Write a refiner (the second encoder alone, aesthetic scores, four levels) and return its folder."""
    pipeline = StableDiffusionXLImg2ImgPipeline(
        **second_encoder(seed),
        text_encoder=None,
        tokenizer=None,
        unet=seeded(seed, refiner_unet),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return _saved(pipeline, folder)


def both_encoders(seed: int) -> dict[str, Any]:
    """Everything of a base model but its UNet."""
    tokenizer = character_tokenizer()
    first = seeded(seed, lambda: CLIPTextModel(text_config(WIDTHS[0], tokenizer)))
    return second_encoder(seed) | {"text_encoder": first, "tokenizer": tokenizer}


def second_encoder(seed: int) -> dict[str, Any]:
    """What every kind of one seed has alike: second encoder, VAE, noise levels."""
    tokenizer = character_tokenizer()
    return {
        "text_encoder_2": seeded(seed, lambda: CLIPTextModelWithProjection(text_config(WIDTHS[1], tokenizer))),
        "tokenizer_2": tokenizer,
        "vae": seeded(seed, random_vae),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network whose weights depend on nothing made before it."""
    torch.manual_seed(seed)
    return make()


def random_vae() -> AutoencoderKL:
    """SDXL's VAE in small: four levels, eight pixels a latent."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def base_unet(channels_in: int) -> UNet2DConditionModel:
    """SDXL's UNet in small: three levels, cross attention on the lower two."""
    return UNet2DConditionModel(
        in_channels=channels_in,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + WIDTHS[1],
        cross_attention_dim=sum(WIDTHS),
    )


def refiner_unet() -> UNet2DConditionModel:
    """The refiner's UNet in small: four levels, cross attention on the middle two, five size ids."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=(1, 2, 4, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=5 * TIME_WIDTH + WIDTHS[1],
        cross_attention_dim=WIDTHS[1],
    )


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == type(pipeline).__name__
    return folder


def character_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with single letters for words: enough to tell prompts apart."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=WINDOW, pad_token=END)


def text_config(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A text encoder two layers deep."""
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
