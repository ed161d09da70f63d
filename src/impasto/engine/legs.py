"""Which network makes which calls of a picture's way: the modes of a request, as data.

Knows requests, schedules and trajectories. Knows no tensors of pictures and no networks.

Text-to-image is one leg over the whole trajectory; a start picture skips the first steps; the refiner takes the last
ones, or a trajectory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from impasto.engine.samplers import Sampler
from impasto.engine.sigmas import NoiseSchedule, Trajectory
from impasto.types import GenerationRequest

Stage = Literal["base", "refiner"]
SECOND_PASS_STRENGTH: Final = 0.3  # of the refiner over finished latents, as the hosted services run it


@dataclass(frozen=True, slots=True, eq=False)
class Leg:
    """The network calls ``[first, end)`` of a trajectory, all by one network.

    Attributes:
        stage: Whose calls they are.
        renoise: Whether finished latents come in, to be noised up to the first level again.
    """

    stage: Stage
    trajectory: Trajectory
    first: int
    end: int
    renoise: bool = False

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def steps(self) -> int:
        """Steps it takes; a step may be several calls."""
        return sum(self.first <= start < self.end for start in self.trajectory.starts)


def plan_legs(
    request: GenerationRequest, sampler: Sampler, schedules: Mapping[Stage, NoiseSchedule]
) -> tuple[Leg, ...]:
    """Return the legs of each image of a request, in order; at least one call is made.

    Source: Podell et al. 2023 (arXiv:2307.01952), section 2.5 for the refiner; Balaji et al. 2022 (arXiv:2211.01324)
    for ensembles of experts; Meng et al. 2021 (arXiv:2108.01073) for starting from a picture.
    """
    steps = request.num_inference_steps
    path = sampler.plan(schedules["base"], steps)
    first = 0 if request.image is None else _start(path, request.strength)
    whole = Leg("base", path, first, len(path))
    if request.refine == "no_refiner":
        return (whole,)
    if request.refine == "base_image_refiner":
        again = sampler.plan(schedules["refiner"], request.refine_steps or steps)
        return whole, Leg("refiner", again, _start(again, SECOND_PASS_STRENGTH), len(again), renoise=True)
    # One trajectory for both, the base's: the refiner goes on from the very level that the base leaves.
    turn = max(first, _below(path, request.high_noise_frac, schedules["base"]))
    shared = (Leg("base", path, first, turn), Leg("refiner", path, turn, len(path)))
    return tuple(leg for leg in shared if len(leg))


def _start(path: Trajectory, strength: float) -> int:
    """The call to start at when only the share ``strength`` of the steps is to run: at least one of them."""
    steps = len(path.starts)
    return path.starts[steps - max(1, int(steps * strength))]


def _below(path: Trajectory, share: float, schedule: NoiseSchedule) -> int:
    """The first step's call past the share ``share`` of the training schedule, or the end."""
    total = schedule.num_train_timesteps
    cut = round(total - share * total)
    return next((start for start in path.starts if path.timesteps[start] < cut), len(path))
