"""Pictures from weights in training, without exporting them: the quick look.

Samples with DDIM (Song et al. 2021, eta 0) and guidance on whatever device there is, and lays the pictures on a sheet.
The evaluation goes through the exported folder and the engine instead. Knows samplers no better than that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from training.architecture import PROMPT_TOKENS
from training.second import autoencoder, machine
from training.second.course import BASES
from training.second.learn import Painter, painter
from training.second.places import SECOND
from training.second.vocabulary import vocabulary
from training.unet import signal_shares

PROMPTS = (
    "a fox on a blue background",
    "a cat on a yellow background",
    "a green cactus on a pink background",
    "a rocket",
    "a red mushroom on a blue background",
    "flat icon of a guitar on an orange background",
    "black and white drawing of a bicycle",
    "a motorcycle in the desert at sunset with mountains",
    "motorcycle, desert, cactus, sunset, mountain",
    "a cat next to a mushroom",
    "a rocket over a mountain",
    "two apples on a white background",
    "a small turtle on the left, green background",
    "a castle in a meadow",
    "a sailboat at sea at sunset",
    "flat whale on purple",
)
FIRST_SEED = 1_000_000


@torch.no_grad()
def sample(
    made: Painter, prompts: list[str], height: int, width: int, steps: int = 20, guidance: float = 5.0,
    seed: int = FIRST_SEED, within: int = 1,
) -> Tensor:  # fmt: skip
    """Latents (prompts, 4, height, width), each from its own seed; words outside the vocabulary are left out.

    ``within`` is the course's.
    """
    place, shares, known = next(made.parameters()).device, signal_shares(), vocabulary()
    said = [" ".join(w for w in text.replace(",", " , ").split() if w in known.rows) for text in prompts]
    ids, ids_2 = (t.to(place) for t in known.encode(said, PROMPT_TOKENS))
    states, pooled = made.reader(ids, ids_2)
    states, pooled = torch.cat([torch.zeros_like(states), states]), torch.cat([torch.zeros_like(pooled), pooled])
    high, wide = 8 * height * within, 8 * width * within
    six = torch.tensor([[high, wide, 0, 0, high, wide]], dtype=torch.float32, device=place)
    dice = [torch.Generator().manual_seed(seed + at) for at in range(len(prompts))]
    x = torch.stack([torch.randn(4, height, width, generator=one) for one in dice]).to(place) / within
    levels = [int(level) + 1 for level in np.arange(steps) * (1000 // steps)][::-1]
    for level, after in zip(levels, [*levels[1:], None], strict=True):
        share = float(shares[level])
        at = torch.full((2 * len(prompts),), level, device=place)
        with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
            none, text = made(torch.cat([x, x]), at, states, pooled, six.expand(len(at), -1)).float().chunk(2)
        noise = none + guidance * (text - none)
        picture = (x - (1 - share) ** 0.5 * noise) / share**0.5
        left = 1.0 if after is None else float(shares[after])
        x = left**0.5 * picture + (1 - left) ** 0.5 * noise
    return x


@torch.no_grad()
def decoded(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents as pictures."""
    pictures = []
    for latent in latents:
        made = vae.decode(latent[None].float()).sample[0].clamp(-1, 1).permute(1, 2, 0)
        pictures.append(Image.fromarray(((made.cpu().numpy() + 1) * 127.5).round().astype(np.uint8)))
    return pictures


def sheet(pictures: list[Image.Image], columns: int = 8, side: int = 192) -> Image.Image:
    """All pictures side by side."""
    made = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for at, picture in enumerate(pictures):
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        made.paste(small, (at % columns * side, at // columns * side))
    return made


def draw(
    made: Painter, vae: AutoencoderKL, target: Path, height: int, width: int, steps: int = 20, within: int = 1
) -> None:
    """The sheet of ``PROMPTS`` as a file; ``within`` is the course's."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet(decoded(vae, sample(made, list(PROMPTS), height, width, steps, within=within))).save(target)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("course", choices=sorted(BASES))
    asked.add_argument("--side", type=int, default=0, help="of the latents; by default those of a 512 px picture")
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--target", type=Path, default=SECOND / "preview.png")
    asked.add_argument("--device", default=None)
    chosen = asked.parse_args()
    where = machine.device(chosen.device)
    course = BASES[chosen.course]
    weights, decoder = painter(course).to(where), autoencoder.settled().to(where)
    side = chosen.side or 64 // course.within
    draw(weights, decoder, chosen.target, side, side, chosen.steps, course.within)
    print(chosen.target)
