"""A clip in flight: all frames of one video, at one noise level, on their way down.

Knows latents, noise and samplers. Knows no network, files or turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from impasto.engine.batch import InFlight
from impasto.engine.conditioning import Conditioning
from impasto.engine.latents import noise, noise_like
from impasto.engine.legs import Leg
from impasto.engine.pace import pace_of
from impasto.engine.samplers import Sampler
from impasto.engine.samplers.moment import Memory, Moment

SHARED_NOISE: Final = 0.5  # of the noise's variance: the same in every frame
# Source: Ge et al. 2023 (arXiv:2305.10474), mixed noise with alpha = 1. Frames that begin alike stay alike.


def clip_noise(shape: tuple[int, ...], frames: int, generator: torch.Generator) -> Tensor:
    """Draw unit-variance noise ``[F, *shape]`` of which a part is the same in all frames, on the CPU."""
    common = noise(shape, generator)
    own = noise((frames, *shape), generator)
    mixed: Tensor = SHARED_NOISE**0.5 * common + (1 - SHARED_NOISE) ** 0.5 * own
    return mixed


@dataclass(slots=True, eq=False)
class Clip:
    """One video.

    Attributes:
        request_id: Whose it is.
        flight: What the engine's admission made of the request: LoRAs, their reports, times.
        starts: Latents of the start picture, moved along for each frame, ``[F, 4, h, w]``; the first is at rest.
        noise: What they were noised with, ``[F, 4, h, w]``.
        latents: All frames at the noise level of the next call, ``[F, 4, h, w]``, float32.
        leg: The network calls to make.
        call: Which of them is next.
        pictures: Frames that are decoded.
    """

    request_id: str
    flight: InFlight
    sampler: Sampler
    conditioning: Conditioning
    generator: torch.Generator
    leg: Leg
    starts: Tensor
    noise: Tensor
    latents: Tensor = field(init=False)
    call: int = field(init=False)
    memory: Memory = ()
    denoised: Tensor | None = None  # the last estimate of the clean latents
    pictures: list[Image.Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.call = self.leg.first
        self.latents = self.starts + self.sigma * self.noise

    @property
    def sigma(self) -> float:
        """Noise level of the latents now."""
        return self.leg.trajectory.sigmas[self.call]

    @property
    def timestep(self) -> Tensor:
        """What the network is told now, a scalar."""
        return self.leg.trajectory.timesteps[self.call]

    @property
    def remaining(self) -> int:
        """Network calls still to make."""
        return self.leg.end - self.call

    @property
    def steps_done(self) -> int:
        """Steps done of ``leg.steps``, by the share of the calls that is."""
        return (len(self.leg) - self.remaining) * self.leg.steps // len(self.leg)

    @property
    def guided(self) -> bool:
        """Whether the next call needs the negative half."""
        share = self.call / len(self.leg.trajectory)
        return self.conditioning.negative is not None and pace_of(self.flight.request).guides(share)

    def advance(self, denoised: Tensor) -> None:
        """Move all frames on, given the estimate of the clean latents; the first frame is held to the start picture.

        Source of the holding: Avrahami et al. 2022 (arXiv:2206.02779), blended latent diffusion, over time in place of
        space.
        """
        moment = Moment(self.latents, denoised, self.call, self.leg.trajectory, self.memory, self._fresh)
        latents, self.memory = self.sampler.step(moment)
        if moment.last:
            latents = latents / (moment.sigma_next**2 + 1) ** 0.5
        held = self.starts[0] + (0.0 if moment.last else moment.sigma_next) * self.noise[0]
        self.latents = torch.cat([held[None], latents[1:]])
        self.denoised = denoised
        self.call += 1

    def _fresh(self) -> Tensor:
        return noise_like(self.latents, self.generator)
