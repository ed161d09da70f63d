"""UniPC: a predictor and a corrector of the same order, second order here, one network call a step.

Knows one moment of one row. Source: Zhao et al. 2023 (arXiv:2302.04867), with ``B(h) = e^h - 1`` ("bh2") and data
prediction; algorithms 5 to 8 of its appendix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from impasto.engine.samplers.moment import Memory, Moment, log_snr

ORDER = 2


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A prediction of the clean latents and the noise level it was made at."""

    denoised: Tensor
    sigma: float


def unipc(moment: Moment) -> tuple[Tensor, Memory]:
    """Correct the latents with the new prediction, then predict the next ones.

    The memory is the predictions so far (two at most), the corrected latents before the last move, and its order.
    """
    now = Seen(moment.denoised, moment.sigma)
    seen: tuple[Seen, ...] = ()
    x = moment.x
    if moment.memory:
        seen, start, order = moment.memory
        x = _corrected(start, now, seen, order)
    seen = (*seen, now)[-ORDER:]
    calls_left = len(moment.trajectory) - moment.call
    order = min(ORDER, calls_left, len(seen))
    return _predicted(x, seen, moment.sigma_next, order), (seen, x, order)


def _predicted(x: Tensor, seen: tuple[Seen, ...], sigma_next: float, order: int) -> Tensor:
    now = seen[-1]
    ratio = sigma_next / now.sigma  # exp(-h); B(h) is ratio - 1 here
    moved = ratio * x - (ratio - 1) * now.denoised
    if order == 1:
        return moved
    before = seen[-2]
    h = log_snr(sigma_next) - log_snr(now.sigma)
    r = (log_snr(before.sigma) - log_snr(now.sigma)) / h
    return moved - (ratio - 1) * 0.5 * (before.denoised - now.denoised) / r


def _corrected(start: Tensor, now: Seen, seen: tuple[Seen, ...], order: int) -> Tensor:
    """Redo the last move with what its end point has taught."""
    at = seen[-1]
    h = log_snr(now.sigma) - log_snr(at.sigma)
    ratio = now.sigma / at.sigma
    moved = ratio * start - (ratio - 1) * at.denoised
    if order == 1:
        return moved - (ratio - 1) * 0.5 * (now.denoised - at.denoised)
    before = seen[-2]
    r = (log_snr(before.sigma) - log_snr(at.sigma)) / h
    weights: list[float] = np.linalg.solve([[1.0, 1.0], [r, 1.0]], _moments(-h)).tolist()
    difference = weights[0] * (before.denoised - at.denoised) / r + weights[1] * (now.denoised - at.denoised)
    return moved - (ratio - 1) * difference


def _moments(hh: float) -> list[float]:
    """``k! phi_k+1(hh) / B(hh)`` for ``k = 1, 2``, where ``phi`` are the exponential integrators' functions."""
    b = np.expm1(hh)
    phi_1 = b / hh - 1
    phi_2 = phi_1 / hh - 0.5
    return [phi_1 / b, 2 * phi_2 / b]
