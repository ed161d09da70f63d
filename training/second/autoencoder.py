"""The second edition's autoencoder: the first edition's, sharpened on the wider art.

With ``part="decoder"`` the encoder stays, and with it the latent space: every UNet and LoRA made for it keeps its
meaning. With ``part="all"`` both learn, for a training that starts anew. Knows pictures and the losses of
``training.vae``. Does not know captions or the UNet.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from impasto.models.catalog import BUILTIN_FOLDER
from training import architecture, checkpoint
from training import vae as first_edition
from training.arithmetic import short
from training.second import art, machine
from training.second.places import SECOND
from training.second.render import render
from training.second.scene import draw
from training.second.subjects import subjects
from training.second.tables import tabulate

STATE = SECOND / "vae.pt"
RUN = SECOND / "vae-run.pt"
SEED, CANVASES, CROP = 31, (128, 192, 256, 384, 512), 96
RATE, STEPS, BATCH = 4e-4, 2000, 16


def crops(drawings: art.Art, count: int, side: int, seed: tuple[int, int]) -> Tensor:
    """Windows (count, 3, side, side) of composed pictures, all of one size by lot."""
    rng = np.random.default_rng(seed)
    canvas = int(rng.choice([size for size in CANVASES if size >= side]))
    each = 4 if canvas > 2 * side else 1
    scenes = [draw(rng, canvas, canvas, len(subjects()), plain=0.5) for _ in range(-(-count // each))]
    made = []
    for picture in render(tabulate(scenes), drawings):
        for top, left in rng.integers(0, canvas - side + 1, (each, 2)):
            made.append(picture[:, top : top + side, left : left + side])
    return torch.stack(made[:count])


def loss_of(vae: AutoencoderKL, pictures: Tensor, part: str) -> Tensor:
    """The first edition's rebuilding error; with the encoder frozen, the decoder's alone and without latent noise."""
    if part == "all":
        noise = torch.randn(len(pictures), 4, *(side // 8 for side in pictures.shape[2:]), device=pictures.device)
        return first_edition.loss_of(vae, pictures, equivariant=True, noise=noise)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
    loss = first_edition.distance(vae.decode(latents).sample, pictures)
    half = vae.decode(F.avg_pool2d(latents, 2)).sample
    return loss + 0.25 * first_edition.distance(half, F.avg_pool2d(pictures, 2))


def train(part: str, steps: int, seconds: float, place: torch.device, batch: int = BATCH, side: int = CROP) -> float:
    """Learn until the steps or the time are over, then settle the result as ``vae.pt``; returns decibels at 256 px."""
    torch.manual_seed(SEED)
    machine.settle(place)
    drawings, vae = art.load(place), settled().to(place, memory_format=torch.channels_last)
    learned = vae if part == "all" else torch.nn.ModuleList([vae.decoder, vae.post_quant_conv])
    learned.requires_grad_(True)
    average = checkpoint.Average(vae, 0.995)
    optimiser = torch.optim.AdamW(learned.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.0)
    done, step, spent = checkpoint.load(RUN), 0, 0.0
    if done and done["part"] == part and done["steps"] == steps:
        vae.load_state_dict(done["live"])
        average.module.load_state_dict(done["average"])
        optimiser.load_state_dict(done["optimiser"])
        step = done["step"]
    began = saved = time.monotonic()

    def keep() -> None:
        states = {"live": vae.state_dict(), "average": average.module.state_dict(), "part": part, "steps": steps}
        checkpoint.save(RUN, states | {"optimiser": optimiser.state_dict(), "step": step})

    while step < steps and spent < seconds:
        share = max(step / steps, spent / seconds)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, 1.05 - share)
        pictures = crops(drawings, batch, side, (SEED, step)).contiguous(memory_format=torch.channels_last)
        optimiser.zero_grad()
        with short(place, share < 0.8):
            loss = loss_of(vae, pictures, part)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimiser.step()
        average.update(vae, step)
        step, spent = step + 1, time.monotonic() - began
        if step % 50 == 0:
            print(f"autoencoder {part} {step}/{steps} loss {loss.item():.4f} {spent:.0f} s", flush=True)
        if time.monotonic() - saved > 60:
            keep()
            saved = time.monotonic()
    keep()
    finished = average.module.float()
    if part == "all":
        first_edition.normalise(finished, crops(drawings, 64, 128, (SEED + 1, 0)))
    before, after = decibels(settled().to(place), drawings), decibels(finished, drawings)
    print(f"autoencoder: {before:.2f} dB before, {after:.2f} dB after, at 256 px")
    if after > before:
        checkpoint.save(STATE, finished.cpu().state_dict())
    return after


@torch.no_grad()
def decibels(vae: AutoencoderKL, drawings: art.Art, side: int = 256, count: int = 24) -> float:
    """Peak signal-to-noise ratio of rebuilt pictures that training did not see."""
    pictures = crops(drawings, count, side, (SEED + 2, side))
    rebuilt = torch.cat([vae.decode(vae.encode(some).latent_dist.mean).sample for some in torch.split(pictures, 4)])
    errors = ((rebuilt.clamp(-1, 1) - pictures) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


def settled(path: Path = STATE) -> AutoencoderKL:
    """The autoencoder in use, latents normalised; at first the one in the package."""
    weights = checkpoint.load(path)
    if weights is None:
        weights = AutoencoderKL.from_pretrained(BUILTIN_FOLDER / "vae", dtype=torch.float32).state_dict()
        checkpoint.save(path, weights)
    vae = architecture.vae()
    vae.load_state_dict(weights)
    return vae.requires_grad_(False).eval()


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--part", choices=("decoder", "all"), default="decoder")
    asked.add_argument("--steps", type=int, default=STEPS)
    asked.add_argument("--seconds", type=float, default=1e9)
    asked.add_argument("--device", default=None)
    chosen = asked.parse_args()
    train(chosen.part, chosen.steps, chosen.seconds, machine.device(chosen.device))
