"""Teach the text encoders to read captions, before anything is drawn: to say what ``cells`` sets down.

The first edition's log found that encoders do not learn to tell nouns apart from the noise error; hundreds of nouns,
and how each thing looks in each style, are learned here without it, at a tenth of the cost of a UNet's step. A linear
head that is thrown away helps to tell the nouns. Knows captions, drawings in small and encoders; draws nothing.
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
from training.arithmetic import short
from training.second import art, cells, machine
from training.second.captions import caption
from training.second.optimiser import MuonBesideAdamW
from training.second.places import SECOND
from training.second.scene import draw
from training.second.subjects import subjects
from training.second.vocabulary import vocabulary
from training.team import asked_to_stop, heed

STATE = SECOND / "reading.pt"
STEPS, BATCH, RATE, MUON, SEED = 4000, 64, 2e-3, 2.5, 3
LAYERS = 4
EMBEDDING_DEVIATION, SMALL = 0.5, 12
QUIET = 1e-3  # how much the size of the words' own states weighs


class Reader(nn.Module):
    """SDXL's pair of text encoders in the compact vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        known = vocabulary()
        self.first, self.second = architecture.text_encoders(
            len(known.used), known.marks[1], architecture.WIDER, LAYERS
        )
        with torch.no_grad():
            for encoder in (self.first, self.second):
                encoder.get_input_embeddings().weight.normal_(0, EMBEDDING_DEVIATION)

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Both encoders' last but one states side by side (n, length, 256), and the pooled vector (n, 160)."""
        first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids_2, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds

    def optimiser(self, others: list[nn.Parameter]) -> MuonBesideAdamW:
        """Muon for the layers' matrices, AdamW for embeddings and the rest."""
        tables = [p for name, p in self.named_parameters() if "embedding" in name]
        known = {id(p) for p in tables}
        return MuonBesideAdamW((p for p in self.parameters() if id(p) not in known), [*tables, *others], MUON, 1.0)


@torch.no_grad()
def begin(reader: Reader, drawings: art.Art) -> None:
    """Give the nouns' embeddings the looks of what they name, so that only how to tell them is left to learn.

    The tokens of a name, or of a synonym, add up to the drawings' principal components, as nearly as tokens that are in
    several names allow (least squares).
    """
    known, names = vocabulary(), [(row, name) for row, s in enumerate(subjects()) for name in (s.name, *s.synonyms)]
    looks = F.adaptive_avg_pool2d(drawings.levels[art.LEVELS[-1]].float() / 255, SMALL).view(len(subjects()), -1)
    counts = torch.zeros(len(names), len(known.used))
    for at, (_, name) in enumerate(names):
        for token in known.rows_of(name):
            counts[at, token] += 1
    wanted = torch.tensor([row for row, _ in names])
    for encoder in (reader.first, reader.second):
        table = encoder.get_input_embeddings().weight
        parts = cells.components(looks, table.shape[1], 0.5)[wanted]
        found = torch.linalg.lstsq(counts, parts, rcond=1e-3, driver="gelsd").solution
        said = counts.sum(0) > 0
        table[said] = EMBEDDING_DEVIATION * (found[said] + 0.2 * torch.randn_like(found[said]))


def lesson(step: int, count: int, cast: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of both encoders, and the meanings (count, kinds); decided by the step."""
    rng = np.random.default_rng((SEED, step))
    scenes = [draw(rng, 512, 512, cast, plain=0.6, pairs=0.3) for _ in range(count)]
    ids, ids_2 = vocabulary().encode([caption(rng, scene) for scene in scenes], architecture.PROMPT_TOKENS)
    return ids, ids_2, torch.tensor([cells.meaning(scene) for scene in scenes])


def train(steps: int = STEPS, state: Path = STATE, cast: int = cells.NOTHING) -> Path:
    """Train the reader on captions of the first ``cast`` subjects; saved every minute, and a later call goes on."""
    torch.manual_seed(SEED)
    place = torch.device("cpu")
    machine.settle(place)
    reader, drawings = Reader(), art.load()
    told = cells.told(drawings)
    machine.suit_readers((reader.first, reader.second), place)
    head = nn.Linear(architecture.WIDER[1], cells.THINGS * (cells.NOTHING + 1))
    average = checkpoint.Average(reader, 0.99)
    optimiser = reader.optimiser(list(head.parameters()))
    step, done = 0, checkpoint.load(state)
    if not done:
        begin(reader, drawings)
    else:
        reader.load_state_dict(done["reader"])
        average.module.load_state_dict(done["average"])
        head.load_state_dict(done["head"])
        optimiser.load_state_dict(done["optimiser"])
        step = done["step"]
    began = saved = time.monotonic()
    sums = torch.zeros(3)

    def keep() -> None:
        weights = {"reader": reader.state_dict(), "average": average.module.state_dict(), "head": head.state_dict()}
        checkpoint.save(state, weights | {"optimiser": optimiser.state_dict(), "step": step, "steps": steps})

    while step < steps and not asked_to_stop():
        for group in optimiser.param_groups:
            group["lr"] = group["pace"] * RATE * min(1, (step + 1) / 50, 0.02 + (steps - step) / (0.7 * steps))
        optimiser.zero_grad()
        ids, ids_2, meant = lesson(step, BATCH, cast)
        with short(place):
            states, pooled = reader(ids, ids_2)
            named = head(pooled).float().unflatten(1, (cells.THINGS, -1))
        squares, rest = cells.error(told, states, pooled, meant)
        names = F.cross_entropy(named.flatten(0, 1), meant[:, : cells.THINGS].flatten())
        loss = 16 * squares + rest + 0.2 * names + QUIET * states[:, : cells.FIRST].float().square().mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        average.update(reader, step)
        step += 1
        with torch.no_grad():
            sums += torch.stack([squares, rest, (named[:, 0].argmax(1) == meant[:, 0]).float().mean()])
        if step % 50 == 0:
            one, other, right = (sums / 50).tolist()
            sums.zero_()
            of = sum(architecture.WIDER) / cells.PARTS  # all else in a square's token is soon told
            print(
                f"reading {step}/{steps} squares {one * of:.3f} pooled {other:.3f} nouns {right:.2f} "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
        if time.monotonic() - saved > 60:
            keep()
            saved = time.monotonic()
    keep()
    return state


def trained(state: Path = STATE) -> Reader:
    """The taught reader, averaged.

    Raises:
        FileNotFoundError: Nothing has been taught.
        ValueError: The lessons are not over.
    """
    done = checkpoint.load(state)
    if done is None:
        raise FileNotFoundError(f"no taught text encoders at {state}: run `python -m training.second.reading` first")
    if done.get("step", 0) < done.get("steps", 0):
        raise ValueError(
            f"{state} has {done['step']} of {done['steps']} steps: let `python -m training.second.reading` end"
        )
    reader = Reader()
    reader.load_state_dict(done["average"])
    return reader


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--steps", type=int, default=STEPS)
    asked.add_argument("--cast", type=int, default=cells.NOTHING, help="how many subjects of the table")
    chosen = asked.parse_args()
    heed()
    train(chosen.steps, cast=chosen.cast)
