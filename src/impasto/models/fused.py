"""One matmul for queries, keys and values, over weights that stay where LoRA patches find them.

Knows diffusers' attention module. Knows no LoRA: ``to_q``, ``to_k`` and ``to_v`` stay, and their weights are views
into the fused one, so whoever edits them in place edits it too, and no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from impasto.models.packed import Pack, suits
from impasto.models.said import Kept, Said


class FusedAttention(Attention):  # type: ignore[misc]  # diffusers has no types
    """Attention with one matmul for q, k, v (self-attention) or for k, v (cross-attention).

    ``fused_weight`` is ``[3 * inner, width]`` or ``[2 * inner, context width]``, a buffer that no file stores.
    """

    fused_weight: Tensor
    attend: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)
    pack: Pack | None = None  # multiplies by the fused weight, where it is to be packed
    kept: Kept | None = None  # keeps keys and values of prompts, where they are to be kept

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
            key, value = self._said(encoder_hidden_states).chunk(2, dim=-1)
        else:
            query, key, value = self._project(hidden_states).chunk(3, dim=-1)
        heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        attended = self.attend(*heads)
        output: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return output

    def _layers(self) -> list[Any]:
        return [self.to_k, self.to_v] if self.is_cross_attention else [self.to_q, self.to_k, self.to_v]

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(layer.weight for layer in self._layers())

    def _said(self, tokens: Tensor) -> Tensor:
        """Keys and values of prompts."""
        if self.kept is None:
            return self._project(tokens)
        return self.kept.answer(tokens, self._parts(), self._project)

    def _project(self, inputs: Tensor) -> Tensor:
        """All projections of ``inputs`` in one product."""
        if self.pack is not None and suits(inputs, self.to_k.weight):
            return self.pack.linear(inputs, self.fused_weight, None, self._parts())
        return F.linear(inputs, self.fused_weight)

    def tie(self) -> None:
        """Lay the separate weights side by side and make each a view of its part."""
        layers = self._layers()
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


def fuse_projections(unet: nn.Module) -> list[FusedAttention]:
    """Fuse the projections of every plain attention of a UNet, in place, and return them; the others stay as they are.

    The answers are the same but for rounding. Weights may be edited in place, moved and cast afterwards, but not
    replaced (``load_state_dict(assign=True)``): fuse after loading.
    """
    attentions: list[Any] = [module for module in unet.modules() if type(module) is Attention and _is_plain(module)]
    for attention in attentions:
        attention.__class__ = FusedAttention
        attention.tie()
    return attentions


def attend_by(attentions: Iterable[FusedAttention], way: Callable[..., Tensor]) -> None:
    """Let attentions run by another function of queries, keys and values than torch's own."""
    for attention in attentions:
        attention.attend = way


def keep_prompts(unet: nn.Module, attentions: Iterable[FusedAttention]) -> None:
    """Let cross-attentions keep keys and values from call to call for as long as the prompts are the same."""
    said = Said()
    said.listen(unet)
    for attention in attentions:
        if attention.is_cross_attention:
            attention.kept = Kept(said)


def pack_projections(attentions: Iterable[FusedAttention]) -> None:
    """Let fused weights be packed for the CPU's matrix product."""
    for attention in attentions:
        attention.pack = Pack()


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
