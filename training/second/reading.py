"""Teach the text encoders to read captions, and to say how the named things look, before anything is drawn.

Both encoders learn, through linear heads that are thrown away, to tell apart what the first edition's log found they
do not learn from the noise error alone: hundreds of nouns, style, background, scenery, count and place. A further head
tells the principal components of the named drawing, so that the states hold its colours and shape in linear form, and
the padding tells them square by square (``cells``). Knows captions, drawings in small and encoders; draws nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import architecture, checkpoint
from training.second import art
from training.second.captions import caption
from training.second.cells import CellHead, table
from training.second.places import SECOND
from training.second.scene import PLACES, Scene, draw
from training.second.subjects import COLOURS, LANDS, SKIES, STYLES, subjects
from training.second.vocabulary import vocabulary

STATE = SECOND / "reading.pt"
STEPS, BATCH, RATE, SEED = 2200, 64, 3e-3, 3
LENGTH = architecture.PROMPT_TOKENS
SQUARES = 16.0  # how much the squares' error weighs
EMBEDDING_DEVIATION = 0.5
LOOKS, THUMB = 48, 12
SAID = ("", "small", "large", "beside", "over", "three", *PLACES)
NOTHING = len(subjects())
KINDS = (NOTHING + 1, NOTHING + 1, len(STYLES), len(COLOURS) + 1, len(LANDS) + 1, len(SKIES) + 1, 2, len(SAID), 4)


class Reader(nn.Module):
    """SDXL's pair of text encoders in the compact vocabulary, and what reads drawings off their padding."""

    def __init__(self) -> None:
        super().__init__()
        known = vocabulary()
        self.first, self.second = architecture.text_encoders(len(known.used), known.marks[1])
        self.cells = CellHead()
        with torch.no_grad():
            for encoder in (self.first, self.second):
                encoder.get_input_embeddings().weight.normal_(0, EMBEDDING_DEVIATION)

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Both encoders' last but one states side by side (n, length, 160), and the pooled vector (n, 96)."""
        first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids_2, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


def shown(scene: Scene) -> tuple[int, int, int]:
    """What ``cells`` are told of: the first two things' subjects, or ``NOTHING``, and the style."""
    names = [*(thing.subject for thing in scene.things), NOTHING, NOTHING]
    return names[0], names[1], scene.style


def meaning(scene: Scene) -> tuple[int, ...]:
    """What a caption of the scene says, one number for each of ``KINDS``."""
    ground = scene.ground
    plain = (ground.colour, len(LANDS), len(SKIES)) if ground.plain else (len(COLOURS), ground.land, ground.sky)
    return *shown(scene), *plain, int(ground.mountains), SAID.index(scene.said), len(scene.things)


def looks(drawings: art.Art) -> Tensor:
    """Every drawing in a few numbers of unit deviation (subjects + 1, styles, ``LOOKS``); zeros for no subject."""
    small = F.adaptive_avg_pool2d(drawings.levels[96].float() / 255, THUMB).flatten(1)
    centred = small - small.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    found = centred @ axes[:LOOKS].T
    found = (found / found.std(0)).view(len(subjects()), len(STYLES), LOOKS)
    return torch.cat([found, torch.zeros(1, len(STYLES), LOOKS)])


def lesson(step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of both encoders, and the meanings (count, kinds); decided by the step."""
    rng = np.random.default_rng((SEED, step))
    scenes = [draw(rng, 512, 512, NOTHING, plain=0.6, pairs=0.3) for _ in range(count)]
    ids, ids_2 = vocabulary().encode([caption(rng, scene) for scene in scenes], LENGTH)
    return ids, ids_2, torch.tensor([meaning(scene) for scene in scenes])


class Heads(nn.Module):
    """Linear heads on a vector of text: a guess for each kind of meaning, and how both subjects look."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Linear(width, sum(KINDS))
        self.looks = nn.Linear(width, 2 * LOOKS)

    def loss(self, vectors: Tensor, wanted: Tensor, looked: Tensor) -> Tensor:
        """Cross-entropies and the squared error of the looks."""
        parts = self.kinds(vectors).split(KINDS, 1)
        total = F.mse_loss(self.looks(vectors), looked)
        for part, target in zip(parts, wanted.T, strict=True):
            total = total + F.cross_entropy(part, target)
        return total


def loss_of(reader: Reader, heads: list[Heads], drawn: Tensor, squares: Tensor, step: int) -> tuple[Tensor, float]:
    """The loss of one step, and how many first subjects the pooled vector tells right."""
    ids, ids_2, wanted = lesson(step, BATCH)
    states, pooled = reader(ids, ids_2)
    ends = (ids == vocabulary().marks[1]).int().argmax(1)
    last = states[torch.arange(BATCH), ends]
    looked = torch.cat([drawn[wanted[:, i], wanted[:, 2]] for i in (0, 1)], 1)
    vectors = (pooled, last[:, : architecture.TEXT_WIDTH], last[:, architecture.TEXT_WIDTH :])
    loss = 1e-3 * states.square().mean() + SQUARES * reader.cells(states, squares, wanted[:, :3])
    for head, vector in zip(heads, vectors, strict=True):
        loss = loss + head.loss(vector, wanted, looked)
    guessed = heads[0].kinds(pooled)[:, : KINDS[0]].argmax(1)
    return loss, float((guessed == wanted[:, 0]).float().mean())


def train(steps: int = STEPS, state: Path = STATE) -> Path:
    """Train the reader; every minute the state is saved, and a later call goes on."""
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    reader, drawings = Reader(), art.load()
    drawn, squares = looks(drawings), table(drawings)
    widths = (architecture.TEXT_2_WIDTH, architecture.TEXT_WIDTH, architecture.TEXT_2_WIDTH)
    heads = [Heads(width) for width in widths]
    thrown = nn.ModuleList(heads)
    learned = [*reader.parameters(), *thrown.parameters()]
    optimiser = torch.optim.AdamW(learned, RATE, betas=(0.9, 0.98), weight_decay=0.01)
    step, done = 0, checkpoint.load(state)
    if done:
        reader.load_state_dict(done["reader"])
        thrown.load_state_dict(done["heads"])
        optimiser.load_state_dict(done["optimiser"])
        step = done["step"]
    began = saved = time.monotonic()

    def keep() -> None:
        parts = {"reader": reader.state_dict(), "heads": thrown.state_dict(), "optimiser": optimiser.state_dict()}
        checkpoint.save(state, parts | {"step": step})

    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50, (steps - step) / (0.5 * steps))
        optimiser.zero_grad()
        loss, right = loss_of(reader, heads, drawn, squares, step)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0:
            spent = time.monotonic() - began
            print(f"reading {step}/{steps} loss {loss.item():.3f} subjects {right:.2f} {spent:.0f} s", flush=True)
        if time.monotonic() - saved > 60:
            keep()
            saved = time.monotonic()
    keep()
    return state


def trained(state: Path = STATE) -> Reader:
    """The taught reader."""
    done = checkpoint.load(state)
    if done is None:
        raise FileNotFoundError(f"no taught text encoders at {state}: run `python -m training.second.reading` first")
    reader = Reader()
    reader.load_state_dict(done["reader"])
    return reader


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--steps", type=int, default=STEPS)
    train(asked.parse_args().steps)
