"""A judge that names the subject and the style of one object on a plain background.

It learns from composed pictures alone, spoiled in light, colour and sharpness, and never sees a generated one. Knows
art and a convolutional network. Does not know prompts or the model it is used on.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import checkpoint
from training.second import art, machine
from training.second.places import SECOND
from training.second.render import render
from training.second.scene import Frame, Ground, Scene, Thing
from training.second.subjects import COLOURS, STYLES, subjects
from training.second.tables import tabulate

STATE = SECOND / "judge.pt"
SIDE, WIDTHS, SEED = 64, (3, 48, 96, 160, 256), 41
STEPS, BATCH, RATE = 3000, 64, 2e-3


class Judge(nn.Module):
    """Strided convolutions, then a linear layer for the subject and one for the style."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(WIDTHS):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
            layers += [nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3))
        inner = WIDTHS[-1] * (SIDE // 16) ** 2
        self.subject, self.style = nn.Linear(inner, len(subjects())), nn.Linear(inner, len(STYLES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of every subject and of every style for pictures (n, 3, any size) of -1..1."""
        small = F.interpolate(pictures, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        inner = self.body(small)
        return self.subject(inner), self.style(inner)


def alone(rng: np.random.Generator) -> Scene:
    """One object near the middle of a plain colour."""
    subject, size = int(rng.integers(len(subjects()))), rng.uniform(0.6, 0.98)
    y, x = rng.uniform(0.5 - (1 - size) / 2, 0.5 + (1 - size) / 2, 2)
    ground = Ground(int(rng.integers(len(COLOURS))))
    return Scene((Thing(subject, size, x, y),), int(rng.integers(len(STYLES))), ground, Frame(96, 96))


def spoiled(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Light, colour and sharpness changed a little, picture by picture."""
    count = len(pictures)
    light = torch.from_numpy(rng.uniform(0.8, 1.15, (count, 1, 1, 1)).astype(np.float32)).to(pictures.device)
    tint = torch.from_numpy(rng.normal(0, 0.06, (count, 3, 1, 1)).astype(np.float32)).to(pictures.device)
    made = pictures * light + tint
    small = int(rng.integers(24, 96))
    soft = F.interpolate(F.interpolate(made, size=(small, small), mode="bilinear", antialias=True), size=(96, 96))
    half = count // 2
    made = torch.cat([soft[:half], made[half:]])
    return made + 0.05 * torch.randn(made.shape, device=made.device)


def examples(drawings: art.Art, count: int, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Composed pictures, and their subject and style (n, 2)."""
    rng = np.random.default_rng(seed)
    scenes = [alone(rng) for _ in range(count)]
    labels = torch.tensor([(scene.things[0].subject, scene.style) for scene in scenes])
    return spoiled(render(tabulate(scenes), drawings), rng), labels.to(drawings.device)


def train(steps: int = STEPS, seconds: float = 1e9, device: str | None = None, state: Path = STATE) -> float:
    """Train to the end or until the time is spent; returns the share of unseen compositions whose subject is right."""
    torch.manual_seed(SEED)
    place = machine.device(device)
    machine.settle(place)
    drawings, made = art.load(place), Judge().to(place)
    optimiser = torch.optim.AdamW(made.parameters(), RATE, weight_decay=0.02)
    step, done = 0, checkpoint.load(state)
    if done and "optimiser" in done:
        made.load_state_dict(done["weights"])
        optimiser.load_state_dict(done["optimiser"])
        step = done["step"]
    began = saved = time.monotonic()

    def keep() -> float:
        right = accuracy(made, drawings)
        checkpoint.save(
            state,
            {
                "weights": {key: value.cpu() for key, value in made.state_dict().items()},
                "optimiser": optimiser.state_dict(),
                "step": step,
                "accuracy": right,
            },
        )
        return right

    while step < steps and time.monotonic() - began < seconds:
        share = max(step / steps, (time.monotonic() - began) / seconds)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100, 1.6 * (1.001 - share))
        pictures, labels = examples(drawings, BATCH if place.type == "cpu" else 8 * BATCH, (SEED, step))
        subject, style = made.train()(pictures)
        loss = F.cross_entropy(subject, labels[:, 0], label_smoothing=0.05) + 0.5 * F.cross_entropy(style, labels[:, 1])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            print(f"judge {step}/{steps} loss {loss.item():.3f} {time.monotonic() - began:.0f} s", flush=True)
        if time.monotonic() - saved > 120:
            keep()
            saved = time.monotonic()
    return keep()


@torch.no_grad()
def accuracy(made: Judge, drawings: art.Art, count: int = 744) -> float:
    """Share of composed pictures of other seeds whose subject is named."""
    made.eval()
    right = 0
    for part in range(4):
        pictures, labels = examples(drawings, count // 4, (SEED + 1, part))
        right += int((made(pictures)[0].argmax(1) == labels[:, 0]).sum())
    return right / (count // 4 * 4)


def trained(state: Path = STATE) -> tuple[Judge, float]:
    """The judge and its accuracy on composed pictures."""
    done = checkpoint.load(state)
    if done is None:
        raise FileNotFoundError(f"no judge at {state}: run `python -m training.second.judge` first")
    made = Judge()
    made.load_state_dict(done["weights"])
    return made.requires_grad_(False).eval(), float(done["accuracy"])


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--steps", type=int, default=STEPS)
    asked.add_argument("--seconds", type=float, default=1e9)
    asked.add_argument("--device", default=None)
    chosen = asked.parse_args()
    print(f"judge: {train(chosen.steps, chosen.seconds, chosen.device):.4f} right")
