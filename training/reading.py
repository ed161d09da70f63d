"""Teach the text encoders to read captions before anything is drawn.

Both encoders learn to tell subject, style and background from a caption, through linear heads that are thrown away.
Without this the background colour, by far the largest part of the early error, crowds the subject out of the text
states: after 36,000 samples changing the noun changed nothing (LOG). Knows captions and encoders; draws nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import architecture, checkpoint
from training.captions import caption
from training.places import CACHE
from training.subjects import BACKGROUNDS, STYLES, SUBJECTS
from training.words import encode, tables, used_ids

STATE = CACHE / "reading.pt"
STEPS, BATCH, RATE, SEED = 400, 48, 2e-3, 3
LENGTH = 32
EMBEDDING_DEVIATION = 0.5
KINDS = (len(SUBJECTS), len(STYLES), len(BACKGROUNDS))


class Reader(nn.Module):
    """SDXL's pair of text encoders in the compact vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = architecture.text_encoders(len(used_ids()), tables()[2])
        with torch.no_grad():
            for encoder in (self.first, self.second):
                encoder.get_input_embeddings().weight.normal_(0, EMBEDDING_DEVIATION)

    def forward(self, captions: list[str], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Both encoders' last but one states side by side, the pooled vector, and where each caption ends."""
        ids, ids_2 = encode(captions, length)
        first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids_2, output_hidden_states=True)
        ends = (ids_2 == tables()[2]).int().argmax(1)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds, ends


def meanings(count: int, step: int) -> tuple[list[str], Tensor]:
    """Captions and what they mean: (count, 3) subject, style, background."""
    rng = np.random.default_rng((SEED, step))
    rows = np.stack([rng.integers(kinds, size=count) for kinds in KINDS], 1)
    return [caption(rng, *(int(v) for v in row)) for row in rows], torch.from_numpy(rows)


def loss_of(reader: Reader, heads: nn.ModuleList, step: int) -> tuple[Tensor, float]:
    """Cross-entropy from the pooled vector and from the states at the end mark; and the pooled subject accuracy."""
    captions, rows = meanings(BATCH, step)
    states, pooled, ends = reader(captions, LENGTH)
    at_end = states[torch.arange(BATCH), ends]
    loss = torch.zeros(())
    first = at_end[:, : architecture.TEXT_WIDTH]
    second = at_end[:, architecture.TEXT_WIDTH :]
    for head, vectors in zip(heads, (pooled, first, second), strict=True):
        for part, wanted in zip(head(vectors).split(KINDS, 1), rows.T, strict=True):
            loss = loss + F.cross_entropy(part, wanted)
    guessed = heads[0](pooled)[:, : KINDS[0]].argmax(1)
    return loss + 1e-3 * states.square().mean(), float((guessed == rows[:, 0]).float().mean())


def train(state: Path = STATE) -> Path:
    """Train the reader; short enough to need no resuming."""
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    reader = Reader()
    widths = (architecture.TEXT_2_WIDTH, architecture.TEXT_WIDTH, architecture.TEXT_2_WIDTH)
    heads = nn.ModuleList(nn.Linear(width, sum(KINDS)) for width in widths)
    learned = [*reader.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(learned, RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 30, (STEPS - step) / (0.5 * STEPS))
        optimiser.zero_grad()
        loss, right = loss_of(reader, heads, step)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        if step % 20 == 19:
            print(f"reading {step + 1}/{STEPS} loss {loss.item():.4f} subjects {right:.2f}", flush=True)
    checkpoint.save(state, reader.state_dict())
    return state


def trained(state: Path = STATE) -> Reader:
    """The taught reader."""
    reader = Reader()
    weights = checkpoint.load(state)
    if weights is None:
        raise FileNotFoundError(f"no taught text encoders at {state}: run `python -m training.reading` first")
    reader.load_state_dict(weights)
    return reader


if __name__ == "__main__":
    train()
