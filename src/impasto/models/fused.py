"""One matmul for queries, keys and values, over weights that stay where LoRA patches find them.

Knows diffusers' attention module. Knows no LoRA: ``to_q``, ``to_k`` and ``to_v`` stay, and their weights are views
into the fused one, so whoever edits them in place edits it too, and no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


class FusedAttention(Attention):  # type: ignore[misc]  # diffusers has no types
    """Attention with one matmul for q, k, v (self-attention) or for k, v (cross-attention).

    ``fused_weight`` is ``[3 * inner, width]`` or ``[2 * inner, context width]``, a buffer that no file stores.
    """

    fused_weight: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend from ``hidden_states [N, L, width]`` to itself or to ``encoder_hidden_states [N, T, context]``.

        A masked call goes the plain way, through the same weights.
        """
        if attention_mask is not None:
            plain: Tensor = super().forward(hidden_states, encoder_hidden_states, attention_mask, **options)
            return plain
        if self.is_cross_attention:
            assert encoder_hidden_states is not None
            query = self.to_q(hidden_states)
            key, value = F.linear(encoder_hidden_states, self.fused_weight).chunk(2, dim=-1)
        else:
            query, key, value = F.linear(hidden_states, self.fused_weight).chunk(3, dim=-1)
        heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(*heads)
        output: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return output

    def tie(self) -> None:
        """Lay the separate weights side by side and make each a view of its part."""
        layers = [self.to_k, self.to_v] if self.is_cross_attention else [self.to_q, self.to_k, self.to_v]
        with torch.inference_mode(False), torch.no_grad():
            fused = torch.cat([layer.weight.data for layer in layers])
            for layer, part in zip(layers, fused.chunk(len(layers)), strict=True):
                layer.weight.data = part
        self.register_buffer("fused_weight", fused, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedAttention:
        """Move or cast, which gives every weight a memory of its own, and tie them again."""
        super()._apply(fn, recurse)
        self.tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come out of a copy or a pickle tied."""
        super().__setstate__(state)
        self.tie()


def fuse_projections(unet: nn.Module) -> None:
    """Fuse the projections of every plain attention of a UNet, in place; the others stay as they are.

    The answers are the same but for rounding. Weights may be edited in place, moved and cast afterwards, but not
    replaced (``load_state_dict(assign=True)``): fuse after loading.
    """
    attentions: list[Any] = [module for module in unet.modules() if type(module) is Attention]
    for attention in filter(_is_plain, attentions):
        attention.__class__ = FusedAttention
        attention.tie()


def _is_plain(attention: Any) -> bool:
    """Whether this is attention as SDXL has it: no biases, norms, residuals or added projections."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "to_add_out")
    return (
        type(attention.processor) is AttnProcessor2_0
        and not attention.use_bias
        and not attention.residual_connection
        and not attention.only_cross_attention
        and not attention.is_causal
        and attention.rescale_output_factor == 1
        and attention.inner_dim == attention.inner_kv_dim
        and attention.dropout == 0
        and all(getattr(attention, name) is None for name in extras)
    )
