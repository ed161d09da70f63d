"""Rows in flight: one image each, with its latents, its place on its trajectory and its conditioning.

Knows how rows are put side by side for one network call. Knows no network and no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from impasto.engine.conditioning import Conditioning, Embedding
from impasto.engine.latents import noise_like
from impasto.engine.samplers import Sampler
from impasto.engine.samplers.moment import Memory, Moment, guided, rescaled
from impasto.engine.sigmas import Trajectory
from impasto.lora.apply import LoraSet
from impasto.types import GenerationRequest


@dataclass(slots=True, eq=False)
class Row:
    """One image on its way from noise to picture."""

    request_id: str
    index: int  # position among the request's images
    seed: int
    latents: Tensor  # [4, H/8, W/8], float32
    trajectory: Trajectory
    sampler: Sampler
    conditioning: Conditioning
    guidance_scale: float
    guidance_rescale: float
    generator: torch.Generator  # on the CPU; has drawn the starting noise
    memory: Memory = ()  # the sampler's own
    calls: int = 0  # network calls done

    @property
    def remaining(self) -> int:
        """Network calls still to make."""
        return len(self.trajectory) - self.calls

    @property
    def sigma(self) -> float:
        """Noise level of the latents now."""
        return self.trajectory.sigmas[self.calls]

    @property
    def timestep(self) -> Tensor:
        """What the network is told now, a scalar."""
        return self.trajectory.timesteps[self.calls]

    def moved(self, denoised: Tensor) -> tuple[Tensor, Memory]:
        """Return the next latents and memory, given the network's estimate of the clean latents ``[4, H/8, W/8]``."""
        draw = partial(noise_like, self.latents, self.generator)
        return self.sampler.step(Moment(self.latents, denoised, self.calls, self.trajectory, self.memory, draw))


@dataclass(slots=True, eq=False)
class InFlight:
    """A request whose images are not all delivered."""

    request: GenerationRequest
    loras: LoraSet
    rows: dict[int, Row] = field(default_factory=dict)  # by row id; finished rows stay until the request ends
    delivered: int = 0
    started: float = 0.0  # time.perf_counter() at admission

    def steps_done(self) -> int:
        """Steps done, averaged over the request's images and rounded down.

        A sampler may take more network calls than steps; a step is done when its share of the calls is.
        """
        calls = sum(len(row.trajectory) for row in self.rows.values())
        return sum(row.calls for row in self.rows.values()) * self.request.num_inference_steps // calls


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


def combine(call: NetworkCall, rows: Sequence[Row], output: Tensor) -> tuple[list[Row], Tensor]:
    """Turn the network's output into one prediction a row.

    Args:
        call: What the network was given.
        rows: The rows it was made from.
        output: The network's answer, ``[N, 4, h, w]``.

    Returns:
        The rows in the order of the predictions, and the predictions ``[B, 4, h, w]``.
    """
    n = call.guided
    negative, positive, plain = output[:n], output[n : 2 * n], output[2 * n :]
    ordered = [rows[i] for i in call.order[n:]]
    prediction = guided(positive, negative, output.new_tensor([row.guidance_scale for row in ordered[:n]]))
    amounts = [row.guidance_rescale for row in ordered[:n]]
    if any(amounts):
        prediction = rescaled(prediction, positive, output.new_tensor(amounts))
    return ordered, torch.cat([prediction, plain])
