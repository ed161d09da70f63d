"""Channels that stay innermost between convolutions and attention.

Knows diffusers' transformer module. Knows no weights.

Where channels lie innermost, tokens are a view of the picture and the picture is a view of the tokens. diffusers
copies the picture into the other order after every transformer, and the next convolution copies it back.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


class InnermostTransformer(Transformer2DModel):  # type: ignore[misc]  # diffusers has no types
    """A transformer whose picture comes out in the order of its tokens."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        tokens = self.proj_out(hidden_states)
        picture = tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        output: Tensor = picture + residual
        return output


def stay_innermost(unet: nn.Module) -> int:
    """Keep a UNet's convolution weights and pictures with the channels innermost, in place.

    Returns:
        How many transformers no longer copy.
    """
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: list[Any] = [module for module in unet.modules() if type(module) is Transformer2DModel]
    suited = [module for module in found if module.use_linear_projection and module.is_input_continuous]
    for module in suited:
        module.__class__ = InnermostTransformer
    return len(suited)
