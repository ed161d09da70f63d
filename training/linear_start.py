"""Weights that already do something simple and exact, so that training learns only the rest.

The autoencoder starts as a mean-colour codec (8x8 means in, smooth enlargement out); the UNet starts by
answering "the noise is the picture I was given". Both rest on SiLU(x) - SiLU(-x) = x: a value and its negative
are carried side by side through the network, beside a few large constants that keep group norms steady.
Knows the layout of diffusers' modules. Does not know data or optimisers.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

STEADY = 6.0
QUIET = 0.02


def carry(convolution: nn.Conv2d, channels: int, kernel: Tensor) -> None:
    """Make the first channels pass through a convolution, each with the given spatial kernel only."""
    convolution.weight[:channels] = 0
    if convolution.bias is not None:
        convolution.bias[:channels] = 0
    for i in range(channels):
        convolution.weight[i, i] = kernel


def tap(size: int) -> Tensor:
    """A kernel that copies."""
    kernel = torch.zeros(size, size)
    kernel[size // 2, size // 2] = 1
    return kernel


def half() -> Tensor:
    """The mean of a 2x2 patch, for the autoencoder's strided convolution (padded right and below)."""
    kernel = torch.zeros(3, 3)
    kernel[:2, :2] = 0.25
    return kernel


def smooth() -> Tensor:
    """Turns nearest-neighbour enlargement into (nearly) linear interpolation."""
    row = torch.tensor([0.25, 0.5, 0.25])
    return torch.outer(row, row)


def enter(convolution: nn.Conv2d, inputs: int, steady: int) -> None:
    """First convolution: inputs, their negatives, then constants of alternating sign."""
    width = 2 * inputs + steady
    convolution.weight[:width] = 0
    convolution.bias[:width] = 0  # type: ignore[index]
    middle = convolution.kernel_size[0] // 2
    for i in range(inputs):
        convolution.weight[i, i, middle, middle] = 1
        convolution.weight[inputs + i, i, middle, middle] = -1
    for i in range(steady):
        convolution.bias[2 * inputs + i] = STEADY * (-1) ** i  # type: ignore[index]


def leave(convolution: nn.Conv2d, outputs: int, negatives: int) -> None:
    """Last convolution: each value minus its negative."""
    convolution.weight[:outputs] *= 0.05
    convolution.bias[:outputs] = 0  # type: ignore[index]
    middle = convolution.kernel_size[0] // 2
    for i in range(outputs):
        convolution.weight[i, i, middle, middle] = 1
        convolution.weight[i, negatives + i, middle, middle] = -1


def soften(module: nn.Module, channels: int) -> None:
    """Scale every residual branch down and let shortcuts pass the carried channels through."""
    for resnet in module.modules():
        if type(resnet).__name__ != "ResnetBlock2D":
            continue
        resnet.conv2.weight *= QUIET  # type: ignore[operator, union-attr]
        resnet.conv2.bias *= 0  # type: ignore[operator, union-attr]
        if isinstance(resnet.conv_shortcut, nn.Conv2d):
            carry(resnet.conv_shortcut, channels, tap(1))


@torch.no_grad()
def start_vae(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Start as a mean-colour codec; the given pictures set the exact scales."""
    encoder, decoder = vae.encoder, vae.decoder
    kept = 3 * 2 + 4
    enter(encoder.conv_in, 3, 4)
    soften(encoder, kept)
    for block in encoder.down_blocks[:-1]:
        carry(block.downsamplers[0].conv, kept, half())
    leave(encoder.conv_out, 3, 3)
    encoder.conv_out.weight[4:] = 0
    encoder.conv_out.bias[4:] = -8
    vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
    vae.quant_conv.bias.zero_()
    vae.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    vae.post_quant_conv.bias.zero_()
    kept = 4 * 2 + 4
    enter(decoder.conv_in, 4, 4)
    soften(decoder, kept)
    for block in decoder.up_blocks[:-1]:
        carry(block.upsamplers[0].conv, kept, smooth())
    leave(decoder.conv_out, 3, 4)
    means = nn.functional.avg_pool2d(pictures, 8)
    fit(encoder.conv_out, vae.encode(pictures).latent_dist.mean[:, :3], means)
    fit(decoder.conv_out, nn.functional.avg_pool2d(vae.decode(vae.encode(pictures).latent_dist.mean).sample, 8), means)


def fit(last: nn.Conv2d, got: Tensor, wanted: Tensor) -> None:
    """Rescale the last convolution's first channels so that what comes out is what is wanted (least squares)."""
    for i in range(wanted.shape[1]):
        x, y = got[:, i].flatten(), wanted[:, i].flatten()
        slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
        last.weight[i] *= slope
        last.bias[i] = slope * last.bias[i] + y.mean() - slope * x.mean()  # type: ignore[index]


@torch.no_grad()
def start_unet(unet: UNet2DConditionModel) -> None:
    """Start by returning the input as the noise estimate, through the outermost skip connection."""
    groups = unet.conv_norm_out.num_groups
    size = unet.conv_in.out_channels // groups
    enter_at, latents, middle = unet.conv_in, 4, unet.conv_in.kernel_size[0] // 2
    for j in range(latents):
        at = size * j
        enter_at.weight[at : at + 4] = 0
        enter_at.bias[at : at + 4] = torch.tensor([0.0, 0.0, STEADY, -STEADY])
        enter_at.weight[at, j, middle, middle], enter_at.weight[at + 1, j, middle, middle] = 1, -1
    last = unet.up_blocks[-1].resnets[-1]
    width, kept = unet.conv_in.out_channels, size * latents
    last.conv_shortcut.weight[:kept] = 0
    last.conv_shortcut.bias[:kept] = 0
    for i in range(kept):
        last.conv_shortcut.weight[i, last.conv_shortcut.in_channels - width + i] = 1
    last.conv2.weight[:kept] *= QUIET
    last.conv2.bias[:kept] = 0
    unet.conv_out.weight *= 0.05
    unet.conv_out.bias.zero_()
    steady = (STEADY**2 / 2 + 0.5) ** 0.5
    for j in range(latents):
        unet.conv_out.weight[j, size * j, 1, 1] = steady
        unet.conv_out.weight[j, size * j + 1, 1, 1] = -steady
