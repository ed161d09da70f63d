"""How a start picture is moved from frame to frame before it is drawn over: a loop a second, of eight frames or more.

Knows poses and latents. Knows no noise, networks or requests.

A motion adapter keeps frames alike and moves what its training moved; a small one moves little. So frames may begin
with the picture already moved, each a little farther along a loop, and the network draws them as one video. Source:
Khachatryan et al. 2023, Text2Video-Zero (arXiv:2303.13439), motion dynamics in latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

REACH: Final = 0.14  # of the side: how far a thing moves each way
HEIGHT: Final = 0.18  # of the side: how high it bounces
TILT: Final = 30.0  # degrees each way
SHRINK: Final = 0.28  # of its size, at the small end of a pulse
LEAST: Final = 8  # frames of a loop


@dataclass(frozen=True)
class Pose:
    """Where a thing is, against its rest: shift right and down in sides, size as a factor, turn in degrees."""

    right: float = 0.0
    down: float = 0.0
    size: float = 1.0
    turn: float = 0.0


def moving(share: float) -> Pose:
    """To the left, back, to the right and back."""
    return Pose(right=-REACH * math.sin(2 * math.pi * share))


def bouncing(share: float) -> Pose:
    """Up and down again, touching the ground once a loop."""
    return Pose(down=-HEIGHT * math.sin(math.pi * share))


def spinning(share: float) -> Pose:
    """Turning one way, then the other."""
    return Pose(turn=TILT * math.sin(2 * math.pi * share))


def pulsing(share: float) -> Pose:
    """Smaller and back, as a heart beats."""
    return Pose(size=1 - SHRINK * math.sin(math.pi * share) ** 2)


def resting(_: float) -> Pose:
    """As it is."""
    return Pose()


Loop = Callable[[float], Pose]

LOOPS: Final[Mapping[str, Loop]] = {
    "none": resting,
    "move": moving,
    "bounce": bouncing,
    "spin": spinning,
    "pulse": pulsing,
}
"""Each motion of ``impasto.types``: from the share of its loop (0..1) to a pose."""


def moved(latents: Tensor, motion: str, frames: int, fps: int) -> Tensor:
    """Return a picture's latents ``[4, h, w]`` for each frame of a video, ``[F, 4, h, w]``; the first is at rest.

    What comes in from outside repeats the picture's edge. ``none`` gives the picture itself, bit for bit.
    """
    whole = latents[None].expand(frames, -1, -1, -1)
    if motion == "none":
        return whole
    loop = max(LEAST, fps)
    poses = [LOOPS[motion]((frame % loop) / loop) for frame in range(frames)]
    height, width = latents.shape[-2:]
    grid = F.affine_grid(_backwards(poses, height / width), list(whole.shape), align_corners=False)
    placed = F.grid_sample(whole, grid.to(latents), "bilinear", "border", align_corners=False)
    return torch.cat([latents[None], placed[1:]])


def _backwards(poses: Sequence[Pose], aspect: float) -> Tensor:
    """The way from places in each frame to places in the picture, both -1..1 from edge to edge: ``[F, 2, 3]``.

    Args:
        poses: Of the frames.
        aspect: Height over width.
    """
    ways = []
    for pose in poses:
        angle = math.radians(pose.turn)
        cos, sin = math.cos(angle) / pose.size, math.sin(angle) / pose.size
        right, down = 2 * pose.right, 2 * pose.down
        across, along = sin * aspect, -sin / aspect
        ways.append([[cos, across, -cos * right - across * down], [along, cos, -along * right - cos * down]])
    return torch.tensor(ways)
