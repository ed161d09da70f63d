"""Train the autoencoder.

Knows its losses and schedule. Does not know captions, noise or the UNet: its one promise to them is latents of
zero mean and unit deviation, in which half the size looks like half the size (scale equivariance), so that one
latent space serves every picture size.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training import architecture, checkpoint
from training.arithmetic import CPU, short
from training.crops import art_by_size, crops
from training.linear_start import start_vae
from training.places import CACHE

STATE = CACHE / "vae.pt"
STEPS, BATCH, SIDE, RATE, SEED = 800, 16, 64, 6e-4, 1
NOISE = 0.05
EQUIVARIANCE_FROM = 0.3
BRIEF_UNTIL = 0.8


def slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours, down and across."""
    return picture[..., 1:, :] - picture[..., :-1, :], picture[..., 1:] - picture[..., :-1]


def distance(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute, edge and squared error together."""
    down, across = slopes(made - wanted)
    return F.l1_loss(made, wanted) + 0.5 * (down.abs().mean() + across.abs().mean()) + 0.5 * F.mse_loss(made, wanted)


def loss_of(vae: AutoencoderKL, pictures: Tensor, equivariant: bool, noise: Tensor) -> Tensor:
    """Rebuild the pictures from noisy latents; later also their halves from halved latents."""
    latents = vae.quant_conv(vae.encoder(pictures))[:, :4]
    spread = latents.detach().std()
    loss: Tensor = distance(vae.decode(latents + noise * NOISE * spread).sample, pictures)
    loss = loss + 1e-3 * latents.square().mean()
    if equivariant:
        half = vae.decode(F.avg_pool2d(latents, 2)).sample
        loss = loss + 0.25 * distance(half, F.avg_pool2d(pictures, 2))
    return loss


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold the latents' mean and deviation into the 1x1 convolutions on either side; fix their noise as tiny."""
    latents = vae.encode(pictures).latent_dist.mean
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    deviation = deviation.clamp(min=0.25 * float(deviation.max()))  # a channel that says little stays quiet
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.weight[4:], quant.bias[4:] = 0, -12
    post.bias += (post.weight[:, :, 0, 0] * mean[None]).sum(1)
    post.weight *= deviation[None, :, None, None]


def rate(step: int, steps: int) -> float:
    """A short warm-up, then flat, then a straight line to zero over the last 60 %."""
    return RATE * min(1.0, (step + 1) / 30, (steps - step) / (0.6 * steps))


def train(steps: int, seconds: float, state: Path = STATE, others: int = 160) -> Path:
    """Train until the step count or the time is reached; every two minutes the state is saved."""
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    sizes = art_by_size(others)
    vae = architecture.vae()
    start_vae(vae, crops(sizes, 32, 128, SEED + 1, 0))
    vae = vae.to(memory_format=torch.channels_last)
    average = checkpoint.Average(vae, 0.995)
    optimiser = torch.optim.AdamW(vae.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.0)
    step, done = 0, checkpoint.load(state)
    if done:
        vae.load_state_dict(done["live"])
        average.module.load_state_dict(done["average"])
        optimiser.load_state_dict(done["optimiser"])
        step = done["step"]
    began = saved = time.monotonic()

    def keep() -> None:
        states = {"live": vae.state_dict(), "average": average.module.state_dict()}
        checkpoint.save(state, states | {"optimiser": optimiser.state_dict(), "step": step, "steps": steps})

    while step < steps and time.monotonic() - began < seconds:
        pictures = crops(sizes, BATCH, SIDE, SEED, step).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(BATCH, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(step))
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps)
        optimiser.zero_grad()
        with short(CPU, step < BRIEF_UNTIL * steps):
            loss = loss_of(vae, pictures, step > EQUIVARIANCE_FROM * steps, noise)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        average.update(vae, step)
        step += 1
        if step % 50 == 0:
            print(f"vae {step}/{steps} loss {loss.item():.4f} {time.monotonic() - began:.0f} s", flush=True)
        if time.monotonic() - saved > 120:
            keep()
            saved = time.monotonic()
    keep()
    return state


def trained(state: Path = STATE) -> AutoencoderKL:
    """The finished autoencoder, latents normalised, without gradients."""
    done = checkpoint.load(state)
    if done is None:
        raise FileNotFoundError(f"no trained autoencoder at {state}: run `python -m training.vae` first")
    vae = architecture.vae()
    vae.load_state_dict(done["average"])
    vae.requires_grad_(False)
    normalise(vae, crops(art_by_size(0), 48, 128, SEED + 1, 1))
    return vae


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--steps", type=int, default=STEPS)
    asked.add_argument("--seconds", type=float, default=1e9)
    chosen = asked.parse_args()
    train(chosen.steps, chosen.seconds)
