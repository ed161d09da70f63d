"""What text is taught to say before the UNet reads it: how the named things look, square by square.

A prompt is padded to 77 tokens, and the encoders' states of the padding are as good a memory as any: there they learn
to say what is in each square of a grid over the first thing, and then over the second; the pooled vector says all else
that a caption means. Both are set down in numbers here, so that the UNet can learn to paint from them before any text
encoder knows them, and the encoders to say them without a UNet, which is much the cheaper lesson: the division of
labour of unCLIP's prior and decoder (Ramesh et al. 2022, arXiv:2204.06125). Knows drawings and meanings; knows no
captions and no networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from training import architecture, checkpoint
from training.second import art
from training.second.places import SECOND
from training.second.scene import PLACES, Scene, usual
from training.second.subjects import COLOURS, LANDS, SKIES, STYLES, subjects

TABLE: Final = SECOND / "told.pt"
GRID: Final = 4  # squares across, and down
SIDE: Final = 24  # pixels of the small drawing that they divide
PARTS: Final = 48  # principal components of a square
THINGS: Final = 2
FIRST: Final = architecture.PROMPT_TOKENS - THINGS * GRID**2  # the token that tells the first square
FEW: Final = PARTS // 3  # of them in the first encoder's part
SIGNS, WAVES, WAVE = 24, 6, 1.5  # numbers of a sign, frequencies in each direction, and how strong they are
LOOKS: Final = 48  # principal components of a whole drawing, which the pooled vector tells
SEED: Final = 29

SAID: Final = ("", "small", "large", "beside", "over", "three", *PLACES)
NOTHING: Final = len(subjects())
TELLABLE: Final = (len(STYLES), len(COLOURS) + 1, len(LANDS) + 1, len(SKIES) + 1, 2, len(SAID), 4)
COLOUR, PLACE = 3, 7  # columns of a ``meaning``
UNSAID: Final = (NOTHING, NOTHING, 0, len(COLOURS), len(LANDS), len(SKIES), 0, 0, 0)  # what an empty prompt means


def meaning(scene: Scene) -> tuple[int, ...]:
    """What a caption of the scene says: two things' subjects, or ``NOTHING``, and then one of each of ``TELLABLE``."""
    ground = scene.ground
    names = [*(thing.subject for thing in scene.things), NOTHING, NOTHING]
    plain = (ground.colour, len(LANDS), len(SKIES)) if ground.plain else (len(COLOURS), ground.land, ground.sky)
    return names[0], names[1], scene.style, *plain, int(ground.mountains), SAID.index(scene.said), len(scene.things)


def components(rows: Tensor, count: int, flatten: float) -> Tensor:
    """Principal components of rows; their deviations are taken to the power ``1 - flatten``, and are 1 on the whole."""
    centred = (rows - rows.mean(0)).double()
    values, axes = torch.linalg.eigh(centred.T @ centred)
    found = (centred @ axes[:, values.argsort(descending=True)[:count]]).float()
    found = found / found.std(0).clamp(min=1e-6).pow(flatten)
    made: Tensor = found / found.std().clamp(min=1e-6)
    return made


def squares_on_pictures() -> Tensor:
    """Where each square usually is (scenery or none, ``SAID``, both things' squares, 3): x, y and size, as shares."""
    steps = (torch.arange(GRID) + 0.5) / GRID - 0.5
    down, across = (step.flatten() for step in torch.meshgrid(steps, steps, indexing="ij"))
    found = []
    for scenic in (False, True):
        for said in SAID:
            for thing in usual(said, scenic):
                size = torch.full_like(down, thing.size)
                found.append(torch.stack([thing.x + across * size, thing.y + down * size, size], 1))
    return torch.stack(found).view(2, len(SAID), THINGS * GRID**2, 3)


def waves(places: Tensor) -> Tensor:
    """Numbers (..., k) in sines and cosines of ``WAVES`` frequencies each (..., 2 * WAVES * k)."""
    angles = torch.pi * torch.arange(1, WAVES + 1) * places[..., None]
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def drawn(drawings: art.Art) -> dict[str, Tensor]:
    """Every drawing in numbers: ``cells`` (subjects + 1, styles, squares, ``PARTS``) and ``looks``."""
    shape = (len(subjects()), len(STYLES))
    small = F.adaptive_avg_pool2d(drawings.levels[art.LEVELS[-1]].float() / 255, SIDE)
    side = SIDE // GRID
    squares = small.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    cells = components(squares, PARTS, 0.5).view(*shape, GRID**2, PARTS)
    looks = components(F.avg_pool2d(small, 2).flatten(1), LOOKS, 1.0).view(*shape, LOOKS)
    return {name: torch.cat([of, of.new_zeros(1, *of.shape[1:])]) for name, of in (("cells", cells), ("looks", looks))}


class Told:
    """The states and the pooled vector that text of any meaning should have.

    A square's token has its components, a third of them in the first encoder's part, and where on the picture the
    square usually is, in waves, so that what looks for a place finds its square by likeness; and a sign of its own for
    its place in the grid. All else in it is zero.
    """

    def __init__(self, cells: Tensor, looks: Tensor) -> None:
        """Of drawings in numbers: ``drawn``'s."""
        self.cells, self.looks = cells, looks
        dice = torch.Generator().manual_seed(SEED)
        signs = torch.randn(THINGS * GRID**2, SIGNS, generator=dice).sign()
        places = WAVE * waves(squares_on_pictures())
        self.places = torch.cat([places, signs.expand(*places.shape[:3], -1)], 3).to(cells.device)

    def states(self, meant: Tensor, noise: float | Tensor = 0.0) -> Tensor:
        """The tokens from ``FIRST`` on (n, 32, 256).

        Args:
            meant: ``meaning`` of each (n, 9).
            noise: On the components (n, 32, ``PARTS``).
        """
        first, second, style = meant[:, :3].unbind(1)
        cells = torch.cat([self.cells[first, style], self.cells[second, style]], 1) + noise
        scenic = (meant[:, COLOUR] == len(COLOURS)).long()
        parts = torch.cat([cells[..., :FEW], self.places[scenic, meant[:, PLACE]]], 2), cells[..., FEW:]
        return torch.cat([F.pad(p, (0, w - p.shape[2])) for p, w in zip(parts, architecture.WIDER, strict=True)], 2)

    def pooled(self, meant: Tensor) -> Tensor:
        """The pooled vector (n, 160): one of each of ``TELLABLE``, then the looks of both things."""
        told = [F.one_hot(column, of) for column, of in zip(meant[:, 2:].unbind(1), TELLABLE, strict=True)]
        first, second, style = meant[:, :3].unbind(1)
        parts = [2.0 * torch.cat(told, 1).float(), self.looks[first, style], self.looks[second, style]]
        made = torch.cat(parts, 1)
        return F.pad(made, (0, architecture.WIDER[1] - made.shape[1]))

    def whole(self, meant: Tensor, worn: float, seed: int) -> Tensor:
        """States of whole prompts (n, 77, 256), noise where the words would be: to be learned to be looked past.

        Each one's components are under noise as well, up to the strength ``worn``: encoders will not tell them exactly.
        """
        dice, count = torch.Generator(meant.device).manual_seed(seed), len(meant)
        words = torch.randn(count, FIRST, sum(architecture.WIDER), generator=dice, device=meant.device)
        noise = torch.randn(count, THINGS * GRID**2, PARTS, generator=dice, device=meant.device)
        much = worn * torch.rand(count, 1, 1, generator=dice, device=meant.device)
        return torch.cat([words, self.states(meant, much * noise)], 1)


def error(told: Told, states: Tensor, pooled: Tensor, meant: Tensor) -> tuple[Tensor, Tensor]:
    """The squared errors (means) of what whole prompts' states (n, 77, 256) and pooled vectors say."""
    return F.mse_loss(states[:, FIRST:].float(), told.states(meant)), F.mse_loss(pooled.float(), told.pooled(meant))


def told(drawings: art.Art, path: Path = TABLE) -> Told:
    """What text should tell, from its file; made there once, as other machines may turn the components' axes."""
    known = checkpoint.load(path)
    if known is None:
        known = drawn(drawings)
        checkpoint.save(path, {name: table.cpu() for name, table in known.items()})
    return Told(known["cells"].to(drawings.device), known["looks"].to(drawings.device))
