"""Which noise levels a sampler visits on its way down: one function for each family of samplers.

Knows schedules and step counts. Knows no latents. Each function names the reference whose timesteps it equals;
``tests/parity/test_samplers.py`` holds them to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from impasto.engine.sigmas import Levels, NoiseSchedule, Trajectory

KARRAS_RHO = 7.0
CONSISTENCY_STEPS = 50  # timesteps of the teacher that LCM and TCD models were distilled on
TCD_ETA = 0.3  # share of each TCD jump that is undone with fresh noise


def interpolated(schedule: NoiseSchedule, steps: int, *, karras: bool = False) -> Trajectory:
    """Euler, Euler ancestral, LMS: timesteps spread by the model's own spacing, ending at no noise.

    Source: Lin et al. 2023 (arXiv:2305.08891), table 2, for the spacings.
    """
    timesteps = _spaced(schedule, steps)
    sigmas = _at(schedule, timesteps)
    # "leading" starts below the schedule's top, where latents still hold signal of unit variance.
    leading = schedule.timestep_spacing == "leading"
    if karras:
        sigmas = _karras(sigmas[0], sigmas[-1], steps)
        timesteps = _timestep_of(schedule, sigmas)
    return _trajectory(timesteps, [*sigmas, 0.0], unit_signal=leading)


def twice(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Heun: every level but the first is visited twice, to correct the step that led there."""
    once = interpolated(schedule, steps)
    first, rest = once.timesteps[:1], once.timesteps[1:].repeat_interleave(2)
    start, *inside, end = once.sigmas
    levels = (start, *(sigma for sigma in inside for _ in range(2)), end)
    return Trajectory(torch.cat([first, rest]), levels, once.initial_scale, starts=range(0, 2 * steps, 2))


def ddim(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DDIM: the same timesteps as whole numbers, ending where the model's configuration says."""
    timesteps = _whole(schedule, steps)
    return _trajectory(timesteps, [*_at(schedule, timesteps), _end(schedule, to_zero=True)])


def plms(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """PNDM without Runge-Kutta warm-up: DDIM's timesteps, the second one twice."""
    timesteps = _whole(schedule, steps)
    timesteps = np.concatenate([timesteps[:1], timesteps[1:2], timesteps[1:]])
    starts = (0, *range(2, len(timesteps)))
    return replace(_trajectory(timesteps, [*_at(schedule, timesteps), _end(schedule, to_zero=False)]), starts=starts)


def midpoints(schedule: NoiseSchedule, steps: int, *, karras: bool = False) -> Trajectory:
    """DPM-Solver++ 2M and UniPC: one more interval than steps, the last one ending at no noise."""
    total = schedule.num_train_timesteps
    if karras:
        training = schedule.training_sigmas()
        sigmas = _karras(training[-1], training[0], steps)
        return _trajectory(_timestep_of(schedule, sigmas).round(), [*sigmas, 0.0])
    if schedule.timestep_spacing == "leading":
        timesteps = (np.arange(steps + 1) * (total // (steps + 1)))[::-1][:-1] + float(schedule.steps_offset)
    elif schedule.timestep_spacing == "trailing":
        timesteps = _spaced(schedule, steps)
    else:
        timesteps = np.linspace(0, total - 1, steps + 1).round()[::-1][:-1]
    return _trajectory(timesteps, [*_at(schedule, timesteps), 0.0])


def even(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DPM-Solver++ 2S: evenly over the whole schedule, whatever the model's spacing."""
    timesteps = np.linspace(0, schedule.num_train_timesteps - 1, steps + 1).round()[::-1][:-1]
    return _trajectory(timesteps, [*_at(schedule, timesteps), 0.0])


def consistency(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """LCM: a subset of the timesteps of the distillation."""
    timesteps = _distilled(schedule, steps)
    return _trajectory(timesteps, [*_at(schedule, timesteps), 0.0])


def jumps(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """TCD: LCM's timesteps, and for each call the lower level its jump goes to."""
    timesteps = _distilled(schedule, steps)
    following = np.append(timesteps[1:], 0.0)
    inner = _at(schedule, np.floor((1 - TCD_ETA) * following))
    levels = [*_at(schedule, timesteps), float(inner[-1])]
    return _trajectory(timesteps, levels, inner=inner)


def _trajectory(
    timesteps: Levels, sigmas: Sequence[float], *, unit_signal: bool = True, inner: Iterable[float] = ()
) -> Trajectory:
    levels = tuple(float(sigma) for sigma in sigmas)
    scale = (levels[0] ** 2 + 1) ** 0.5 if unit_signal else levels[0]
    told = torch.from_numpy(np.ascontiguousarray(timesteps, dtype=np.float32))
    return Trajectory(told, levels, scale, tuple(float(sigma) for sigma in inner))


def _at(schedule: NoiseSchedule, timesteps: Levels) -> Levels:
    """Sigma at (fractional) timesteps, by linear interpolation."""
    training = schedule.training_sigmas()
    return np.interp(timesteps, np.arange(len(training)), training)


def _end(schedule: NoiseSchedule, *, to_zero: bool) -> float:
    """No noise, or the first training level: as the schedule says, else ``to_zero``."""
    wanted = to_zero if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 0.0 if wanted else float(schedule.training_sigmas()[0])


def _spaced(schedule: NoiseSchedule, steps: int) -> Levels:
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "leading":
        return (np.arange(steps) * (total // steps))[::-1] + float(schedule.steps_offset)
    if schedule.timestep_spacing == "trailing":
        return np.arange(total, 0, -total / steps).round() - 1
    return np.linspace(0, total - 1, steps, dtype=np.float32)[::-1].astype(np.float64)


def _whole(schedule: NoiseSchedule, steps: int) -> Levels:
    return _spaced(schedule, steps).round()


def _distilled(schedule: NoiseSchedule, steps: int) -> Levels:
    interval = schedule.num_train_timesteps // CONSISTENCY_STEPS
    teacher = (np.arange(1, CONSISTENCY_STEPS + 1) * interval - 1)[::-1]
    picked = np.floor(np.linspace(0, CONSISTENCY_STEPS, steps, endpoint=False)).astype(int)
    timesteps: Levels = teacher[picked].astype(np.float64)
    return timesteps


def _karras(highest: float, lowest: float, steps: int) -> Levels:
    """Karras et al. 2022 (arXiv:2206.00364), equation 5."""
    ramp: Levels = np.linspace(0, 1, steps)
    high, low = highest ** (1 / KARRAS_RHO), lowest ** (1 / KARRAS_RHO)
    levels: Levels = (high + ramp * (low - high)) ** KARRAS_RHO
    return levels


def _timestep_of(schedule: NoiseSchedule, sigmas: Levels) -> Levels:
    """The (fractional) timesteps of noise levels, by interpolation of the logarithm."""
    training = schedule.training_sigmas()
    return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))
