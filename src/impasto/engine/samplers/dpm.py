"""DPM-Solver++: exponential integrators that reuse or insert predictions of the clean latents.

Knows one moment of one row. Source of all: Lu et al. 2022 (arXiv:2211.01095), with ``lambda = -log(sigma)`` and the
signal never scaled, where ``sigma_t / alpha_t`` of the paper is our ``sigma``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from impasto.engine.samplers.moment import Memory, Moment, log_snr

FEW_STEPS = 15  # below this the last step drops to first order even if it ends above zero noise


@dataclass(frozen=True, slots=True)
class Jump:
    """The exact linear part of a move between two noise levels, and what multiplies the rest."""

    keep: float  # factor of x
    gain: float  # factor of the predicted clean latents
    spread: float  # factor of fresh noise; 0 for the ODE

    @classmethod
    def between(cls, sigma: float, sigma_next: float, stochastic: bool) -> Jump:
        """Of the ODE (equation 8 of the paper), or of the SDE (its appendix on SDE-DPM-Solver++)."""
        ratio = sigma_next / sigma  # exp(-h)
        if not stochastic:
            return cls(ratio, 1 - ratio, 0.0)
        return cls(ratio**2, 1 - ratio**2, sigma_next * math.sqrt(max(0.0, 1 - ratio**2)))

    def apply(self, x: Tensor, clean: Tensor, moment: Moment, stochastic: bool) -> Tensor:
        """Move ``x``; the SDE draws its noise even where it adds none, so that streams do not depend on the level."""
        moved = self.keep * x + self.gain * clean
        return moved + self.spread * moment.noise() if stochastic else moved


def multistep(moment: Moment, *, stochastic: bool) -> tuple[Tensor, Memory]:
    """2M: second order from this prediction and the one before; first order at both ends.

    The memory is the previous prediction and its noise level. Source: algorithm 2.
    """
    jump = Jump.between(moment.sigma, moment.sigma_next, stochastic)
    memory = (moment.denoised, moment.sigma)
    ends_low = moment.last and (moment.sigma_next == 0 or len(moment.trajectory) < FEW_STEPS)
    clean = moment.denoised
    if moment.memory and not ends_low:
        before, sigma_before = moment.memory
        h, h_before = log_snr(moment.sigma_next) - log_snr(moment.sigma), log_snr(moment.sigma) - log_snr(sigma_before)
        clean = clean + 0.5 * (h / h_before) * (moment.denoised - before)
    return jump.apply(moment.x, clean, moment, stochastic), memory


def singlestep(moment: Moment, *, stochastic: bool) -> tuple[Tensor, Memory]:
    """2S: every second call goes back to where the first began and jumps over both with what both saw.

    The memory is the start of the pair: its latents, prediction and noise level. Source: algorithm 1.
    """
    jumps_over = moment.memory and moment.call % 2 == 1 and not moment.last  # pairs count from the schedule's top
    if not jumps_over:
        jump = Jump.between(moment.sigma, moment.sigma_next, stochastic)
        moved = jump.apply(moment.x, moment.denoised, moment, stochastic)
        return moved, (moment.x, moment.denoised, moment.sigma)
    start, first, sigma_start = moment.memory
    jump = Jump.between(sigma_start, moment.sigma_next, stochastic)
    h, h_inner = (log_snr(s) - log_snr(sigma_start) for s in (moment.sigma_next, moment.sigma))
    clean = first + 0.5 * (h / h_inner) * (moment.denoised - first)
    return jump.apply(start, clean, moment, stochastic), ()
