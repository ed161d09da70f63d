"""The shapes of the four networks: SDXL's classes and block types, narrower and shallower.

Knows configurations only. Does not know how the weights start (``linear_start``) or are learned.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

UNET_WIDTHS = (32, 64, 128)
VAE_WIDTHS = (16, 32, 64, 64)
TEXT_WIDTHS = (64, 96)  # of the first and the second encoder; the second edition's are ``WIDER``
WIDER = (96, 160)
TEXT_WIDTH, TEXT_2_WIDTH = TEXT_WIDTHS
TIME_DIM = 32
BOS, EOS = 49406, 49407
VOCABULARY = 49408
PROMPT_TOKENS = 77


def vae() -> AutoencoderKL:
    """8x down, 4 channels; no mid-block attention, so that 1536 px is only more of the same work."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=VAE_WIDTHS,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=512,
        force_upcast=False,
    )


def unet(
    widths: tuple[int, ...] = UNET_WIDTHS, text_widths: tuple[int, int] = TEXT_WIDTHS, kernel: int = 3
) -> UNet2DConditionModel:
    """SDXL's block pattern, two layers a block so that its block names all exist.

    Args:
        widths: Channels of each level; the outermost does not attend, of five the outer two.
        text_widths: Of both text encoders.
        kernel: Of the first convolution.
    """
    plain = max(1, len(widths) - 3)
    attending = len(widths) - plain
    return UNet2DConditionModel(
        sample_size=64,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * attending,
        up_block_types=("CrossAttnUpBlock2D",) * attending + ("UpBlock2D",) * plain,
        block_out_channels=widths,
        conv_in_kernel=kernel,
        layers_per_block=2,
        transformer_layers_per_block=(1,) * len(widths),
        attention_head_dim=tuple(width // 32 for width in widths),
        cross_attention_dim=sum(text_widths),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=6 * TIME_DIM + text_widths[1],
    )


def text_config(width: int, activation: str, vocabulary: int, eos: int, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder; SDXL reads its last but one layer."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=PROMPT_TOKENS,
        hidden_act=activation,
        bos_token_id=0 if vocabulary < VOCABULARY else BOS,
        eos_token_id=eos,
        pad_token_id=1,
    )


def text_encoders(
    vocabulary: int, eos: int, widths: tuple[int, int] = TEXT_WIDTHS, layers: int = 3
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders, for a vocabulary of the given size."""
    first = CLIPTextModel(text_config(widths[0], "quick_gelu", vocabulary, eos, layers))
    second = CLIPTextModelWithProjection(text_config(widths[1], "gelu", vocabulary, eos, layers))
    return first, second


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule, written out in full."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        interpolation_type="linear",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=False,
    )
