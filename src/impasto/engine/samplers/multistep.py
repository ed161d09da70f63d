"""Linear multistep samplers: LMS (Adams-Bashforth over the noise levels) and PNDM's PLMS.

Knows one moment of one row.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from impasto.engine.samplers.moment import Memory, Moment

ORDER = 4
# Adams-Bashforth weights for equal steps, newest slope first, by number of slopes known.
_PLMS = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def lms(moment: Moment) -> tuple[Tensor, Memory]:
    """Integrate the polynomial through the last four slopes up to the next level.

    The memory is the earlier slopes, newest first. Source: Katherine Crowson's linear multistep sampler; Adams-
    Bashforth for unequal steps, Hairer et al., Solving Ordinary Differential Equations I, section III.5.
    """
    slopes = (moment.slope, *moment.memory)[:ORDER]
    levels = [moment.trajectory.sigmas[moment.call - k] for k in range(len(slopes))]
    weights = _integrals(levels, moment.sigma, moment.sigma_next)
    return moment.x + sum(w * slope for w, slope in zip(weights, slopes, strict=True)), slopes[: ORDER - 1]


def _integrals(levels: list[float], start: float, end: float) -> list[float]:
    """Integrals from ``start`` to ``end`` of the Lagrange polynomials over ``levels``."""
    weights = []
    for j, level in enumerate(levels):
        others = [other for k, other in enumerate(levels) if k != j]
        basis = np.poly1d(np.poly(others) / np.prod([level - other for other in others])) if others else np.poly1d([1])
        primitive = basis.integ()
        weights.append(float(primitive(end) - primitive(start)))
    return weights


def plms(moment: Moment) -> tuple[Tensor, Memory]:
    """Pseudo linear multistep: Adams-Bashforth weights on predicted noises, the first step done twice.

    The memory is the start of the first step (``None`` afterwards) and the earlier slopes, newest first.
    Source: Liu et al. 2022 (arXiv:2202.09778), equation 12, without Runge-Kutta warm-up as Stable Diffusion does.
    """
    change = moment.sigma_next - moment.sigma
    if moment.call == 0:
        return moment.x + moment.slope * change, ((moment.x, moment.sigma), (moment.slope,))
    start, slopes = moment.memory or (None, ())  # nothing yet, where a start picture skips the first steps
    if moment.call == 1:
        x, sigma = start
        mean = (moment.slope + slopes[0]) / 2
        return x + mean * (moment.sigma_next - sigma), (None, slopes)
    slopes = (moment.slope, *slopes)[:ORDER]
    combined = sum(w * slope for w, slope in zip(_PLMS[len(slopes)], slopes, strict=True))
    return moment.x + combined * change, (None, slopes)
