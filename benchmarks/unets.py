"""UNets to time, and what they are called with. Knows no clocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks import roofline
from benchmarks.weights import SIZES, filled
from impasto.models.catalog import BUILTIN_FOLDER

ROWS: Final = 2  # a guided picture


def make_unet(model: str, dtype: torch.dtype) -> Any:
    """A UNet by the name of its model, the same weights each time."""
    if model in SIZES:
        return filled(lambda: UNet2DConditionModel(**SIZES[model]["unet"]), dtype=dtype)
    folder = BUILTIN_FOLDER if model == "builtin" else Path(model)
    return UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype).requires_grad_(False).eval()


def inputs_of(config: Any, side: int, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random inputs of a UNet call, by default a guided step's, as ``Denoiser.predict`` takes them."""
    torch.manual_seed(0)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return (
        torch.randn(rows, config.in_channels, side // roofline.CELL, side // roofline.CELL),
        torch.full((rows,), 500.0),
        torch.randn(rows, roofline.TOKENS, config.cross_attention_dim),
        torch.randn(rows, pooled),
        torch.full((rows, 6), float(side)),
    )
