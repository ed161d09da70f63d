"""A UNet grown around another: outer levels for detail, while the inner one composes on latents of a fourth the side.

As in progressive growing (Karras et al. 2018, arXiv:1710.10196), but around the middle: at its first step the grown
network hands the means of 4x4 latents to the inner levels, which have learned just that (``Course.within``), so that
what is learned where a sample costs little holds where it costs much. Knows the layout of diffusers' UNet.
"""

from __future__ import annotations

import re

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from training.linear_start import carry, half, soften, start_unet

ENDS = ("conv_in.", "conv_norm_out.", "conv_out.")  # the inner network's, which the outer levels stand in for


def renamed(inner: UNet2DConditionModel, levels: int) -> dict[str, Tensor]:
    """The inner network's weights by their names in one of so many levels more; its ends are left out."""
    found = {}
    for name, weight in inner.state_dict().items():
        if not name.startswith(ENDS):
            found[re.sub(r"^down_blocks\.(\d+)", lambda m: f"down_blocks.{int(m[1]) + levels}", name)] = weight
    return found


@torch.no_grad()
def grow(unet: UNet2DConditionModel, inner: UNet2DConditionModel) -> None:
    """Begin as the inner network under levels that hand latents on, and with the noisy picture as the estimate.

    Attention that the inner network lacks adds nothing yet.

    Args:
        unet: Two levels more than ``inner``, as wide as its outermost.
        inner: Its first convolution looks at one latent at a time.

    Raises:
        ValueError: The networks do not fit.
    """
    levels = len(unet.down_blocks) - len(inner.down_blocks)
    if levels != 2 or inner.conv_in.kernel_size != (1, 1):
        raise ValueError("the grown network must have two levels more, and the inner one a first convolution of 1x1")
    found = unet.state_dict()
    start_unet(unet)
    for name, module in unet.named_modules():
        if name.endswith("proj_out") and isinstance(module, nn.Linear):
            module.weight.zero_()
            module.bias.zero_()
    known = renamed(inner, levels)
    if any(name not in found or found[name].shape != weight.shape for name, weight in known.items()):
        raise ValueError("the networks' inner levels are not alike")
    unet.load_state_dict(known, strict=False)
    width, latents = unet.conv_in.out_channels, inner.conv_in.in_channels
    for block in unet.down_blocks[:levels]:
        soften(block, width)
    outer, last = (block.downsamplers[0].conv for block in unet.down_blocks[:levels])
    mean = half().flip(0, 1)  # a UNet pads on all sides, so that the patch begins in the middle
    carry(outer, width, mean)
    last.weight.zero_()
    last.bias.copy_(inner.conv_in.bias)
    of = width // unet.conv_norm_out.num_groups  # ``start_unet`` has each latent in the first channel of a group
    for latent in range(latents):
        last.weight[:, of * latent] = inner.conv_in.weight[:, latent] * mean


def inner_part(unet: UNet2DConditionModel, inner: UNet2DConditionModel) -> list[nn.Parameter]:
    """The parameters of a grown network that the inner one had."""
    known = renamed(inner, len(unet.down_blocks) - len(inner.down_blocks))
    return [parameter for name, parameter in unet.named_parameters() if name in known]
