"""Which kind of model a single file is, told by the names and shapes of its tensors.

Knows how the field's files are laid out, SDXL's and others'. Reads no files and imports no torch.
"""

from __future__ import annotations

import re
from typing import Literal

from impasto.errors import ModelError
from impasto.models.header import Header

Kind = Literal["base", "inpaint", "refiner"]

# Prefixes of the networks in the original layout.
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = "conditioner.embedders.0.transformer."
CLIP_G = "conditioner.embedders.1.model."
CLIP_G_ALONE = "conditioner.embedders.0.model."  # the refiner's only encoder

UNET_CHANNELS: dict[int, Kind] = {4: "base", 9: "inpaint"}  # inpainting adds a mask and the masked picture
_CONV_IN = UNET + "input_blocks.0.0.weight"
_FAMILIES = {2048: "SDXL", 1280: "SDXL refiner", 768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
_EMBEDDING_WIDTHS = (768, 1024, 1280)
_LORA = "a LoRA: give it with --lora, or as a request's loras"
_EMBEDDING = "a textual-inversion embedding"

# What a file is, by names that only it has; the first that fits.
_OTHERS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"(^|\.)control_model\.|input_hint_block\.|^controlnet_|^lllite_|^lora_controlnet$", "a ControlNet"),
        (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter"),
        (r"(^|[._])lora[._]|^lycoris_|\.hada_w\d|\.lokr_w\d|\.oft_(blocks|diag)|\.dora_scale$", _LORA),
        (r"(^|\.)double_blocks\.|^single_transformer_blocks\.", "a Flux model"),
        (r"(^|\.)joint_blocks\.|^transformer_blocks\.\d+\.attn\.add_q_proj\.", "a Stable Diffusion 3 model"),
        (r"^cond_stage_model\.transformer\.", "a Stable Diffusion 1 checkpoint"),
        (r"^cond_stage_model\.model\.", "a Stable Diffusion 2 checkpoint"),
        (r"(^|\.)patch_embedding\.", "a Wan video model"),
        (r"^emb_params$|^string_to_param|^clip_[gl]$", _EMBEDDING),
    )
)
_VAE_ALONE = re.compile(r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|mid\.|mid_block\.)")
_TEXT_ALONE = re.compile(r"(.*\.)?(encoder\.layers|transformer\.resblocks)\.\d+\.")


def checkpoint_kind(header: Header, name: str) -> Kind:
    """Tell whether an SDXL checkpoint is a base model, an inpainting model or a refiner.

    Raises:
        ModelError: Another kind of file; the message says which.
    """
    if _holds(header, UNET) and _holds(header, CLIP_G):
        return _kind_by_channels(header, name)
    if _holds(header, UNET) and _holds(header, CLIP_G_ALONE):
        return "refiner"
    raise ModelError(f"model {name!r} is {_other(header)}")


def _kind_by_channels(header: Header, name: str) -> Kind:
    """Tell by what the UNet reads; where that tensor is missing, loading will say so."""
    channels = header[_CONV_IN].shape[1] if _CONV_IN in header and len(header[_CONV_IN].shape) == 4 else 4
    if channels not in UNET_CHANNELS:
        raise ModelError(
            f"model {name!r} has an SDXL UNet that reads {channels} channels; 4 (base) and 9 (inpainting) are known"
        )
    return UNET_CHANNELS[channels]


def _holds(header: Header, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in header)


def _other(header: Header) -> str:
    """Name a file that is no SDXL checkpoint for what it is."""
    for pattern, kind in _OTHERS:
        if any(pattern.search(key) for key in header):
            return f"{kind}, not an SDXL checkpoint"
    if _holds(header, "down_blocks."):
        return f"a {_family(header)} UNet alone in diffusers' layout; give the whole folder"
    if _holds(header, UNET):
        return f"a {_family(header)} UNet without its text encoders; give a whole checkpoint"
    if any(_VAE_ALONE.match(key) for key in header):
        return "a VAE alone, not an SDXL checkpoint"
    if any(_TEXT_ALONE.match(key) for key in header):
        return "a text encoder alone, not an SDXL checkpoint"
    if _is_embedding(header):
        return f"{_EMBEDDING}, not an SDXL checkpoint"
    return f"no checkpoint we know: first of {len(header)} tensors is {min(header, default='-')[:100]!r}"


def _family(header: Header) -> str:
    """Tell the family by the width that cross-attention reads."""
    shapes = (info.shape for key, info in header.items() if key.endswith("attn2.to_k.weight"))
    return _FAMILIES.get(next(shapes, (0,))[-1], "foreign")


def _is_embedding(header: Header) -> bool:
    """Tell diffusers' embeddings: one tensor, named by its word, as wide as a text encoder."""
    return len(header) == 1 and all(info.shape and info.shape[-1] in _EMBEDDING_WIDTHS for info in header.values())
