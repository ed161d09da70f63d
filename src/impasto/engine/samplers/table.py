"""The samplers by name: each one's trajectory and step.

Knows which belong together. The names users may send, and other spellings of them, stand in ``types``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from impasto.engine import trajectories as plan
from impasto.engine.samplers.consistency import lcm, tcd
from impasto.engine.samplers.dpm import multistep, singlestep
from impasto.engine.samplers.euler import euler, euler_ancestral, heun
from impasto.engine.samplers.moment import Step
from impasto.engine.samplers.multistep import lms, plms
from impasto.engine.samplers.unipc import unipc
from impasto.engine.sigmas import NoiseSchedule, Trajectory


@dataclass(frozen=True, slots=True)
class Sampler:
    """A way from noise to picture: where it stops on the way, and how it moves between the stops."""

    plan: Callable[[NoiseSchedule, int], Trajectory]
    step: Step


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(plan.interpolated, euler),
    "euler_karras": Sampler(partial(plan.interpolated, karras=True), euler),
    "euler_a": Sampler(plan.interpolated, euler_ancestral),
    "heun": Sampler(plan.twice, heun),
    "ddim": Sampler(plan.ddim, euler),
    "dpmpp_2m": Sampler(plan.midpoints, partial(multistep, stochastic=False)),
    "dpmpp_2m_karras": Sampler(partial(plan.midpoints, karras=True), partial(multistep, stochastic=False)),
    "dpmpp_2m_sde": Sampler(plan.midpoints, partial(multistep, stochastic=True)),
    "dpmpp_2m_sde_karras": Sampler(partial(plan.midpoints, karras=True), partial(multistep, stochastic=True)),
    "dpmpp_2s": Sampler(plan.even, partial(singlestep, stochastic=False)),
    "dpmpp_sde": Sampler(plan.even, partial(singlestep, stochastic=True)),
    "unipc": Sampler(plan.midpoints, unipc),
    "lms": Sampler(plan.interpolated, lms),
    "lms_karras": Sampler(partial(plan.interpolated, karras=True), lms),
    "pndm": Sampler(plan.plms, plms),
    "lcm": Sampler(plan.consistency, lcm),
    "tcd": Sampler(plan.jumps, tcd),
}
