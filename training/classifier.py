"""A small judge that names the subject of a picture.

It learns from composed real pictures alone, with augmentation, and never sees a generated one. Knows art and a
convolutional network. Does not know prompts or the model it is used on.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import checkpoint
from training.art import Pixels, shrink, subject_art
from training.crops import background, blend
from training.places import CACHE
from training.subjects import SUBJECTS

SIDE = 64
STATE = CACHE / "classifier.pt"
STEPS, BATCH, SEED = 700, 32, 21


def network() -> nn.Sequential:
    """Four strided convolutions and a linear layer."""
    widths = (3, 32, 64, 96, 128)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, len(SUBJECTS)))


def thumbnails() -> Pixels:
    """All subjects in both styles, small enough to move about quickly."""
    return np.stack([np.stack([shrink(style, SIDE * 2) for style in subject]) for subject in subject_art()])


def spoil(rng: np.random.Generator, picture: Tensor) -> Tensor:
    """Change light, colour and sharpness a little."""
    picture = picture * float(rng.uniform(0.8, 1.15)) + torch.from_numpy(rng.normal(0, 0.06, (3, 1, 1))).float()
    if rng.random() < 0.5:
        small = int(rng.integers(20, SIDE))
        picture = F.interpolate(picture[None], size=small, mode="bilinear", antialias=True)[0]
        picture = F.interpolate(picture[None], size=SIDE, mode="bilinear")[0]
    return picture + 0.05 * torch.from_numpy(rng.standard_normal(picture.shape)).float()


def examples(art: Pixels, count: int, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Composed pictures -1..1 and their subjects; another seed gives other sizes, places and backgrounds."""
    rng = np.random.default_rng(seed)
    pictures, labels = [], rng.integers(len(art), size=count)
    for label in labels:
        size = int(SIDE * rng.uniform(0.6, 0.95))
        y, x = rng.integers(0, SIDE - size + 1, 2)
        sheet = np.zeros((SIDE, SIDE, 4), np.uint8)
        sheet[y : y + size, x : x + size] = shrink(art[label, rng.integers(2)], size)
        pictures.append(spoil(rng, torch.from_numpy(blend(sheet, background(rng, SIDE)))))
    return torch.stack(pictures), torch.from_numpy(labels)


def judge() -> tuple[nn.Sequential, float]:
    """The trained judge and its accuracy on composed pictures it was not trained on."""
    torch.manual_seed(SEED)
    made, art = network(), thumbnails()
    done = checkpoint.load(STATE)
    if done and done["subjects"] == [s.name for s in SUBJECTS]:
        made.load_state_dict(done["weights"])
        return made.eval(), float(done["accuracy"])
    optimiser = torch.optim.AdamW(made.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=STEPS)
    for step in range(STEPS):
        pictures, labels = examples(art, BATCH, (SEED, step))
        loss = F.cross_entropy(made(pictures), labels, label_smoothing=0.05)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    made.eval()
    with torch.no_grad():
        pictures, labels = examples(art, 1000, (SEED + 1, 0))
        accuracy = float((made(pictures).argmax(1) == labels).float().mean())
    names = [s.name for s in SUBJECTS]
    checkpoint.save(STATE, {"weights": made.state_dict(), "accuracy": accuracy, "subjects": names})
    return made, accuracy


@torch.no_grad()
def named(made: nn.Sequential, pictures: Tensor) -> Tensor:
    """The subject index of each picture (n, 3, any size, -1..1)."""
    small = F.interpolate(pictures, size=SIDE, mode="bilinear", antialias=True)
    guessed: Tensor = made(small).argmax(1)
    return guessed
