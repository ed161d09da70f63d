"""Rows in flight: one image each, with its latents, its place on its way and its conditioning.

Knows how rows are put side by side for one network call. Knows no network and no policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from impasto.engine.conditioning import Conditioning
from impasto.engine.latents import Kept, noise_like
from impasto.engine.legs import Leg, Stage
from impasto.engine.pace import Pace, pace_of
from impasto.engine.pictures import Start
from impasto.engine.samplers import Sampler
from impasto.engine.samplers.moment import Memory, Moment, guided, rescaled
from impasto.lora.apply import LoraSet
from impasto.lora.report import LoraReport
from impasto.types import GenerationRequest


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Where one network call takes a row: latents for the next call, the sampler's memory, what is held in place."""

    latents: Tensor
    memory: Memory
    kept: Kept | None


@dataclass(slots=True, eq=False)
class Row:
    """One image on its way from noise to picture."""

    request_id: str
    request: GenerationRequest
    index: int  # position among the request's images
    seed: int
    latents: Tensor  # [4, H/8, W/8], float32, at the noise level of the next call
    legs: tuple[Leg, ...]
    sampler: Sampler
    conditioning: Mapping[Stage, Conditioning]
    generator: torch.Generator  # on the CPU; has drawn the starting noise
    kept: Kept | None = None  # what inpainting holds in place
    beside: Tensor | None = None  # what an inpainting network reads beside the latents, [5, H/8, W/8]
    memory: Memory = ()  # the sampler's own
    features: Tensor | None = None  # the UNet's deep features of an earlier call, [halves, C, h, w]
    denoised: Tensor | None = None  # the last estimate of the clean latents
    at: int = 0  # which leg
    call: int = 0  # which call of the leg's trajectory is next
    calls: int = 0  # network calls done, in all legs
    pace: Pace = field(init=False)  # what the request lets it leave out

    def __post_init__(self) -> None:
        self.call = self.leg.first
        self.pace = pace_of(self.request)

    @property
    def leg(self) -> Leg:
        """The leg the row is on."""
        return self.legs[self.at]

    @property
    def remaining(self) -> int:
        """Network calls still to make."""
        return sum(map(len, self.legs)) - self.calls

    @property
    def sigma(self) -> float:
        """Noise level of the latents now."""
        return self.leg.trajectory.sigmas[self.call]

    @property
    def timestep(self) -> Tensor:
        """What the network is told now, a scalar."""
        return self.leg.trajectory.timesteps[self.call]

    @property
    def steers(self) -> Conditioning:
        """What steers the next call."""
        return self.conditioning[self.leg.stage]

    @property
    def guided(self) -> bool:
        """Whether the next call needs the negative half."""
        return self.steers.negative is not None and self.pace.guides(self.call / len(self.leg.trajectory))

    @property
    def shallow(self) -> bool:
        """Whether the next call can make do with the deep features of an earlier one."""
        if self.features is None or self.pace.whole(self.call, self.leg.first, len(self.leg.trajectory)):
            return False
        return len(self.features) > self.guided  # features of both halves, if both are to be predicted

    @property
    def began_step(self) -> bool:
        """Whether the next call begins a step, rather than being a further call of one."""
        return self.call in self.leg.trajectory.starts

    def steps_done(self, steps: int) -> int:
        """Steps done of the ``steps`` that run, by the share of the network calls that is."""
        return self.calls * steps // (self.calls + self.remaining)

    def moved(self, denoised: Tensor) -> Move:
        """Return where the row goes, given the network's estimate of the clean latents ``[4, H/8, W/8]``."""
        draw = partial(noise_like, self.latents, self.generator)
        moment = Moment(self.latents, denoised, self.call, self.leg.trajectory, self.memory, draw)
        latents, memory = self.sampler.step(moment)
        if moment.last:  # samplers that end above no noise leave latents of unit variance, as the VAE was trained on
            latents = latents / (moment.sigma_next**2 + 1) ** 0.5
        if self.kept is not None and self.beside is None:
            latents = self.kept.hold(latents, 0.0 if moment.last else moment.sigma_next)
        if not self.ends_leg or self.remaining == 1:
            return Move(latents, memory, self.kept)
        following = self.legs[self.at + 1]
        if not following.renoise:
            return Move(latents, (), self.kept)
        fresh = draw()
        kept = self.kept and replace(self.kept, noise=fresh)
        return Move(latents + following.trajectory.sigmas[following.first] * fresh, (), kept)

    @property
    def ends_leg(self) -> bool:
        """Whether the next call is the leg's last."""
        return self.call == self.leg.end - 1

    def advance(self, move: Move) -> None:
        """Go where ``moved`` said, and to the next leg where this one ends. It cannot fail."""
        hands_over = self.ends_leg and self.remaining > 1
        self.latents, self.memory, self.kept = move.latents, move.memory, move.kept
        self.call += 1
        self.calls += 1
        if hands_over:
            self.at += 1
            self.call = self.leg.first
            self.features = self.beside = None


@dataclass(slots=True, eq=False)
class InFlight:
    """A request whose images are not all delivered."""

    request: GenerationRequest
    loras: LoraSet
    reports: tuple[LoraReport, ...]  # what became of each LoRA
    start: Start | None
    steps: int  # that run for each image
    preview_every: int = 0  # steps between previews; 0: none
    rows: dict[int, Row] = field(default_factory=dict)  # by row id; finished rows stay until the request ends
    delivered: int = 0
    started: float = 0.0  # time.perf_counter() at admission
    stages: dict[str, float] = field(default_factory=dict)  # seconds spent on it so far, by stage

    def steps_done(self) -> int:
        """Steps done, averaged over the request's images and rounded down.

        A sampler may take more network calls than steps; a step is done when its share of the calls is.
        """
        calls = sum(row.calls + row.remaining for row in self.rows.values())
        return sum(row.calls for row in self.rows.values()) * self.steps // calls

    def took(self, stage: str, seconds: float) -> None:
        """Note time spent in a stage: ``encode``, ``denoise`` (shared with the others of a batch) or ``decode``."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds


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
    """Lay rows out for one call. All rows must have the same stage, latent shape and length of tokens."""
    with_guidance = [i for i, row in enumerate(rows) if row.guided]
    plain = [i for i, row in enumerate(rows) if not row.guided]
    order = with_guidance + with_guidance + plain
    halves = [rows[i].steers for i in order]
    embeddings, ids = [], []
    for position, steers in enumerate(halves):
        negative = steers.negative if position < len(with_guidance) else None
        embeddings.append(negative or steers.positive)
        ids.append(steers.negative_time_ids if negative else steers.time_ids)
    return NetworkCall(
        order=order,
        guided=len(with_guidance),
        tokens=torch.stack([e.tokens for e in embeddings]),
        pooled=torch.stack([e.pooled for e in embeddings]),
        time_ids=torch.stack(ids),
    )


def features_of(call: NetworkCall, rows: Sequence[Row]) -> Tensor:
    """Lay the rows' deep features out for one call: the negative half of a row is its first."""
    last = [rows[i].features for i in call.order]
    chosen = [f[0 if position < call.guided else -1] for position, f in enumerate(last) if f is not None]
    return torch.stack(chosen)


def keep_features(call: NetworkCall, rows: Sequence[Row], features: Tensor) -> None:
    """Give each row its part of the deep features of a call, ``[N, C, h, w]``."""
    for i, row in enumerate(rows):
        if row.pace.reuses:
            row.features = features[[position for position, owner in enumerate(call.order) if owner == i]]


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
    scales = [row.request.guidance_scale for row in ordered[:n]]
    prediction = guided(positive, negative, output.new_tensor(scales))
    amounts = [row.request.guidance_rescale for row in ordered[:n]]
    if any(amounts):
        prediction = rescaled(prediction, positive, output.new_tensor(amounts))
    return ordered, torch.cat([prediction, plain])
