"""Reuse of the UNet's deep features between neighbouring steps: most of the network is skipped.

Knows the order of an SDXL UNet's parts. Knows no steps, rows or policy: when to reuse what is the caller's.

What enters the last up block changes slowly from one step to the next, and nearly all of the work goes into it. A
shallow call takes it from an earlier full call and runs only the outermost ring: the first down block and the last up
block. Approximate, but for features of the same inputs.

Source: Ma et al. 2023, DeepCache (arXiv:2312.00858), section 3.2, with the skip branch at the outermost level.
"""

from __future__ import annotations

from itertools import zip_longest
from threading import get_ident
from typing import Any

from torch import Tensor


def predict_whole(
    unet: Any, sample: Tensor, timesteps: Tensor, tokens: Tensor, added_cond: dict[str, Tensor]
) -> Tensor:
    """Run the whole UNet; inputs as ``predict_full``'s.

    Returns:
        The output ``[N, 4, h, w]``.
    """
    output: Tensor = unet(
        sample, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=added_cond, return_dict=False
    )[0]
    return output


def predict_full(
    unet: Any, sample: Tensor, timesteps: Tensor, tokens: Tensor, added_cond: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Run the whole UNet, and keep what enters its last up block.

    Args:
        unet: A ``UNet2DConditionModel`` of SDXL's kind.
        sample: ``[N, C, h, w]``.
        timesteps: ``[N]``.
        tokens: ``[N, T, D]``.
        added_cond: ``text_embeds [N, P]`` and ``time_ids [N, 6]`` (5 for the refiner).

    Returns:
        The output ``[N, 4, h, w]``, bit for bit what ``unet(...)`` gives, and the features ``[N, F, h, w]``.
    """
    features: list[Tensor] = []
    last, here = unet.up_blocks[-1], get_ident()

    def keep(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if get_ident() == here:  # other threads may be running other rows
            features.append(inputs["hidden_states"])

    hook = last.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        # The class's own forward: a replayed CUDA graph on the instance would run no hooks.
        output = type(unet).forward(
            unet, sample, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=added_cond, return_dict=False
        )[0]
    finally:
        hook.remove()
    return output, features[0]


def predict_shallow(
    unet: Any, sample: Tensor, timesteps: Tensor, tokens: Tensor, added_cond: dict[str, Tensor], features: Tensor
) -> Tensor:
    """Run the outermost ring of the UNet around the given ``features [N, F, h, w]``; inputs as ``predict_full``'s.

    Returns:
        The output ``[N, 4, h, w]``.
    """
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
    emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=tokens, added_cond_kwargs=added_cond)
    last = unet.up_blocks[-1]
    inputs = {"hidden_states": features, "temb": emb, "res_hidden_states_tuple": _ring(unet, sample, emb, tokens)}
    if getattr(last, "has_cross_attention", False):
        inputs["encoder_hidden_states"] = tokens
    output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(last(**inputs))))
    return output


def _ring(unet: Any, sample: Tensor, emb: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Return the skips of the first down block, without its downsampler, which leads inwards."""
    hidden = unet.conv_in(sample)
    skips = [hidden]
    first = unet.down_blocks[0]
    for resnet, attention in zip_longest(first.resnets, getattr(first, "attentions", ())):
        hidden = resnet(hidden, emb)
        if attention is not None:
            hidden = attention(hidden, encoder_hidden_states=tokens, return_dict=False)[0]
        skips.append(hidden)
    return tuple(skips)
