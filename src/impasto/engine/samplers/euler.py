"""First-order samplers: Euler (and DDIM, which is Euler in other words), Euler ancestral; and Heun, their correction.

Knows one moment of one row. Knows no schedule: where to go next is the trajectory's.
"""

from __future__ import annotations

from torch import Tensor

from impasto.engine.samplers.moment import Memory, Moment


def euler(moment: Moment) -> tuple[Tensor, Memory]:
    """Follow the probability-flow ODE along its slope.

    Source: Karras et al. 2022, algorithm 2 with ``S_churn = 0`` (arXiv:2206.00364). With the timesteps of
    Song et al. 2020 (arXiv:2010.02502, ``eta = 0``) it is DDIM, by the change of variables of that paper's section 4.3.
    """
    return moment.x + moment.slope * (moment.sigma_next - moment.sigma), ()


def euler_ancestral(moment: Moment) -> tuple[Tensor, Memory]:
    """Go below the next noise level, then add fresh noise up to it.

    Source: Song et al. 2020 (arXiv:2011.13456), equation 47, in the form of Karras et al. for ancestral steps.
    """
    now, to = moment.sigma, moment.sigma_next
    up = (to**2 * (now**2 - to**2) / now**2) ** 0.5
    down = (to**2 - up**2) ** 0.5
    return moment.x + moment.slope * (down - now) + up * moment.noise(), ()


def heun(moment: Moment) -> tuple[Tensor, Memory]:
    """Take an Euler step, look at the slope there, and take it again with the mean of both slopes.

    Two network calls a step, except the last, which is plain Euler. The memory holds the step being corrected.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
    """
    if not moment.memory:
        if moment.last:
            return euler(moment)
        change = moment.sigma_next - moment.sigma
        return moment.x + moment.slope * change, (moment.x, moment.slope, change)
    start, first_slope, change = moment.memory
    return start + (first_slope + moment.slope) / 2 * change, ()
