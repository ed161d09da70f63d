"""What the marks after a caption come to mean: how the named things look, square by square.

A prompt is padded to 77 tokens, and the encoders' states of the padding are as good a memory as any: there they learn
to say what is in each square of a grid over the first thing, and then over the second. The UNet looks up a square with
its attention instead of unfolding a whole drawing out of one vector. Knows drawings and states; knows no captions.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import architecture
from training.second import art
from training.second.subjects import STYLES, subjects

GRID: Final = 4  # squares across, and down
SIDE: Final = 16  # pixels of the small drawing that they divide
PARTS: Final = 24  # principal components of a square: 97 % of what is in it
THINGS: Final = 2
FIRST: Final = architecture.PROMPT_TOKENS - THINGS * GRID**2  # the token that tells the first square


def table(drawings: art.Art) -> Tensor:
    """Every square of every drawing (subjects + 1, styles, squares, ``PARTS``) of unit deviation; no subject: zeros."""
    small = F.adaptive_avg_pool2d(drawings.levels[art.LEVELS[-1]].float() / 255, SIDE)
    side = SIDE // GRID
    squares = small.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    centred = squares - squares.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    found = centred @ axes[:PARTS].T
    found = found / found.std(0).clamp(min=1e-6).sqrt()  # large components weigh more, though not by their squares
    found = (found / found.std().clamp(min=1e-6)).view(len(subjects()), len(STYLES), GRID**2, PARTS)
    return torch.cat([found, found.new_zeros(1, len(STYLES), GRID**2, PARTS)])


class CellHead(nn.Module):
    """Reads the squares off the encoders' states; of use in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Linear(architecture.TEXT_WIDTH + architecture.TEXT_2_WIDTH, PARTS)

    def forward(self, states: Tensor, known: Tensor, shown: Tensor) -> Tensor:
        """The squared error (mean) of what the states tell.

        Args:
            states: Of whole prompts (n, 77, 160).
            known: ``table``'s.
            shown: Both things' subjects and the style (n, 3).
        """
        told = self.parts(states[:, FIRST:]).float()
        first, second, style = shown.unbind(1)
        return F.mse_loss(told, torch.cat([known[first, style], known[second, style]], 1))
