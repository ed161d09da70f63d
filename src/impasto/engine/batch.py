"""Rows in flight: one image each, with its latents, its place on its trajectory and its conditioning.

Knows how rows are put side by side for one network call. Knows no network and no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from impasto.engine.conditioning import Conditioning, Embedding
from impasto.engine.samplers import guided
from impasto.engine.sigmas import Trajectory
from impasto.types import GenerationRequest


@dataclass(slots=True, eq=False)
class Row:
    """One image on its way from noise to picture."""

    request_id: str
    index: int  # position among the request's images
    seed: int
    latents: Tensor  # [4, H/8, W/8], float32
    trajectory: Trajectory
    conditioning: Conditioning
    guidance_scale: float
    step: int = 0  # steps done

    @property
    def remaining(self) -> int:
        """Steps still to run."""
        return len(self.trajectory) - self.step


@dataclass(slots=True, eq=False)
class InFlight:
    """A request whose images are not all delivered."""

    request: GenerationRequest
    rows: dict[int, Row] = field(default_factory=dict)  # by row id; finished rows stay until the request ends
    delivered: int = 0
    started: float = 0.0  # time.perf_counter() at admission

    def steps_done(self) -> int:
        """Steps done, averaged over the request's images and rounded down."""
        return sum(row.step for row in self.rows.values()) // len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class NetworkCall:
    """The inputs of one UNet call over several rows; guided rows appear twice, negative half first.

    Rows without guidance come last and appear once, so a mixed batch wastes nothing.
    """

    order: list[int]  # which of the given rows each network row belongs to
    guided: int  # how many rows are guided: network rows [0, guided) negative, [guided, 2 * guided) positive
    tokens: Tensor  # [N, T, D]
    pooled: Tensor  # [N, P]
    time_ids: Tensor  # [N, 6]


def network_call(rows: Sequence[Row]) -> NetworkCall:
    """Lay rows out for one call. All rows must have the same latent shape."""
    with_guidance = [i for i, row in enumerate(rows) if row.conditioning.negative is not None]
    plain = [i for i, row in enumerate(rows) if row.conditioning.negative is None]
    order = with_guidance + with_guidance + plain
    embeddings: list[Embedding] = []
    for position, i in enumerate(order):
        conditioning = rows[i].conditioning
        negative = conditioning.negative if position < len(with_guidance) else None
        embeddings.append(negative or conditioning.positive)
    return NetworkCall(
        order=order,
        guided=len(with_guidance),
        tokens=torch.stack([e.tokens for e in embeddings]),
        pooled=torch.stack([e.pooled for e in embeddings]),
        time_ids=torch.stack([rows[i].conditioning.time_ids for i in order]),
    )


def combine(call: NetworkCall, output: Tensor, guidance: Tensor) -> tuple[list[int], Tensor]:
    """Turn the network's output into one prediction a row.

    Args:
        call: What the network was given.
        output: Its answer, ``[N, 4, h, w]``.
        guidance: Guidance scale of each given row, ``[B]``.

    Returns:
        The given rows' positions in the order of the predictions, and the predictions ``[B, 4, h, w]``.
    """
    n = call.guided
    negative, positive, plain = output[:n], output[n : 2 * n], output[2 * n :]
    positions = call.order[n:]
    return positions, torch.cat([guided(positive, negative, guidance[positions[:n]]), plain])
