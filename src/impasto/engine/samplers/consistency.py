"""Few-step samplers for distilled models: LCM and TCD.

Knows one moment of one row.
"""

from __future__ import annotations

from torch import Tensor

from impasto.engine.samplers.moment import Memory, Moment

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def lcm(moment: Moment) -> tuple[Tensor, Memory]:
    """Jump to the clean latents, then add fresh noise up to the next level.

    Source: Luo et al. 2023 (arXiv:2310.04378), algorithm 3, with the boundary scalings of consistency models.
    """
    t = float(moment.trajectory.timesteps[moment.call]) * TIMESTEP_SCALING
    skip = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
    out = t / (t**2 + SIGMA_DATA**2) ** 0.5
    unit_variance = moment.x / (moment.sigma**2 + 1) ** 0.5
    clean = out * moment.denoised + skip * unit_variance
    return (clean if moment.last else clean + moment.sigma_next * moment.noise()), ()


def tcd(moment: Moment) -> tuple[Tensor, Memory]:
    """Jump part of the way past the next level, then add fresh noise back up to it.

    ``trajectory.inner`` has the level each jump goes to. Source: Zheng et al. 2024 (arXiv:2402.19159), algorithm 1.
    """
    inner = moment.trajectory.inner[moment.call]
    moved = moment.denoised + inner * moment.slope
    if moment.last:
        return moved, ()
    return moved + max(0.0, moment.sigma_next**2 - inner**2) ** 0.5 * moment.noise(), ()
