"""Noise levels: which timesteps a trajectory visits and how noisy the latents are at each.

Knows the training schedule of a model (as ``scheduler_config.json`` states it). Knows no latents and no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impasto.errors import ModelError

SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The noise schedule a model was trained with; the defaults are SDXL's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("beta_schedule", ("scaled_linear", "linear")),
            ("timestep_spacing", SPACINGS),
            ("prediction_type", ("epsilon",)),
        ):
            if getattr(self, name) not in allowed:
                raise ModelError(f"the model's scheduler has {name}={getattr(self, name)!r}; known: {allowed}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``; keys that do not shape the schedule are passed over."""
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def training_sigmas(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return sigma at every training timestep, ``[num_train_timesteps]``, growing, unitless.

        Source: Ho et al. 2020 (arXiv:2006.11239) for the betas; Karras et al. 2022 (arXiv:2206.00364), where
        ``sigma = sqrt((1 - alpha_bar) / alpha_bar)`` makes latents ``x0 + sigma * noise``.
        """
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        ends = (self.beta_start**power, self.beta_end**power)
        betas = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float32) ** (1 / power)
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        return (((1 - alpha_bar) / alpha_bar) ** 0.5).numpy()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The noise levels one image passes through.

    Attributes:
        timesteps: What the network is told at each step, ``[steps]``, falling.
        sigmas: Noise level before each step and after the last, ``[steps + 1]``, falling to 0.
        initial_scale: Standard deviation of the starting latents.
    """

    timesteps: Tensor
    sigmas: Tensor
    initial_scale: float

    def __len__(self) -> int:
        return len(self.timesteps)


def trajectory(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Spread ``steps`` noise levels over the schedule.

    Source: Lin et al. 2023 (arXiv:2305.08891), table 2, for the spacings.
    Parity: ``tests/parity/test_sigmas.py``, equal to diffusers' EulerDiscreteScheduler.
    """
    timesteps = _spaced(schedule, steps)
    training = schedule.training_sigmas()
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    sigmas = np.append(sigmas, 0.0).astype(np.float32)
    # "leading" starts below the schedule's top, where latents still hold signal of unit variance.
    scale = (sigmas[0] ** 2 + 1) ** 0.5 if schedule.timestep_spacing == "leading" else sigmas[0]
    return Trajectory(torch.from_numpy(timesteps), torch.from_numpy(sigmas), float(scale))


def _spaced(schedule: NoiseSchedule, steps: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "leading":
        return (np.arange(steps) * (total // steps))[::-1].astype(np.float32) + np.float32(schedule.steps_offset)
    if schedule.timestep_spacing == "trailing":
        return np.arange(total, 0, -total / steps).round().astype(np.float32) - 1
    return np.linspace(0, total - 1, steps, dtype=np.float32)[::-1].copy()
