"""What a sampler is given at one step, and what it gives back.

Knows tensors and numbers. Knows no sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impasto.engine.sigmas import Trajectory

Memory = tuple[Any, ...]  # what a sampler keeps between the steps of one row; each sampler's own, () at first


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """One row right after a network call.

    Attributes:
        x: Noisy latents ``[4, H/8, W/8]``, float32, ``x = x0 + sigma * noise``.
        denoised: The network's estimate of ``x0``, after guidance.
        call: Number of this network call on the row's trajectory, from 0.
        trajectory: Where the row has been and will go.
        memory: What the sampler returned last time.
        noise: Draws fresh unit noise of ``x``'s shape from the row's own generator.
    """

    x: Tensor
    denoised: Tensor
    call: int
    trajectory: Trajectory
    memory: Memory
    noise: Callable[[], Tensor]

    @property
    def sigma(self) -> float:
        """Noise level of ``x``."""
        return self.trajectory.sigmas[self.call]

    @property
    def sigma_next(self) -> float:
        """Noise level to move to."""
        return self.trajectory.sigmas[self.call + 1]

    @property
    def last(self) -> bool:
        """Whether this is the row's last network call."""
        return self.call == len(self.trajectory) - 1

    @property
    def slope(self) -> Tensor:
        """``dx / dsigma`` of the probability-flow ODE here: the predicted noise."""
        return (self.x - self.denoised) / self.sigma


Step = Callable[[Moment], tuple[Tensor, Memory]]


def log_snr(sigma: float) -> float:
    """Half the log signal-to-noise ratio, ``lambda`` of the DPM-Solver papers: ``-log(sigma)``."""
    return math.inf if sigma == 0 else -math.log(sigma)


def per_row(values: Tensor) -> Tensor:
    """Shape one value a row, ``[B]``, to multiply latents, ``[B, 1, 1, 1]``."""
    return values.view(-1, 1, 1, 1)


def scale_input(x: Tensor, sigma: Tensor) -> Tensor:
    """Bring noisy latents to the unit variance the network was trained on: ``x / sqrt(sigma^2 + 1)``.

    Args:
        x: Noisy latents ``[B, 4, H/8, W/8]``.
        sigma: Noise level of each row, ``[B]``.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1, variance-preserving ``c_in``.
    """
    return x / per_row((sigma**2 + 1) ** 0.5)


def denoise(x: Tensor, output: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Turn the network's output into its estimate of the clean latents, row by row.

    Source: Ho et al. 2020 (arXiv:2006.11239) for ``epsilon``; Salimans and Ho 2022 (arXiv:2202.00512), section 4, for
    ``v_prediction``.
    """
    if prediction_type == "epsilon":
        return x - per_row(sigma) * output
    variance = sigma**2 + 1
    return x / per_row(variance) - per_row(sigma / variance**0.5) * output


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Push the prediction away from the unconditional one, row by row.

    Source: Ho and Salimans 2022, classifier-free guidance (arXiv:2207.12598), in the form of Imagen's equation 6.
    """
    return unconditional + per_row(scale) * (conditional - unconditional)


def rescaled(guided_output: Tensor, conditional: Tensor, amount: Tensor) -> Tensor:
    """Pull the spread of a guided prediction back to the conditional one's, by ``amount`` (0..1) of each row.

    Source: Lin et al. 2023 (arXiv:2305.08891), section 3.4.
    """
    axes = list(range(1, conditional.ndim))
    ratio = conditional.std(dim=axes, keepdim=True) / guided_output.std(dim=axes, keepdim=True)
    return torch.lerp(guided_output, guided_output * ratio, per_row(amount))
