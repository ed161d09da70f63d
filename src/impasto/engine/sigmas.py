"""Noise levels: how noisy the latents are at each timestep of the schedule a model was trained with.

Knows the training schedule (as ``scheduler_config.json`` states it) and what a trajectory is. Knows no latents and
no network; which levels a sampler visits is in ``trajectories.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from impasto.errors import ModelError

Levels = NDArray[np.floating[Any]]

SPACINGS = ("leading", "linspace", "trailing")
LAST_ALPHA_BAR = 2.0**-24  # stands for zero at the end of a zero-SNR schedule, where sigma would be infinite


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
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool | None = None  # whether DDIM and PNDM end at no noise at all; None: each its own way

    def __post_init__(self) -> None:
        for name, allowed in (
            ("beta_schedule", ("scaled_linear", "linear")),
            ("timestep_spacing", SPACINGS),
            ("prediction_type", ("epsilon", "v_prediction")),
        ):
            if getattr(self, name) not in allowed:
                raise ModelError(f"the model's scheduler has {name}={getattr(self, name)!r}; known: {allowed}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``; keys that do not shape the schedule are passed over.

        Raises:
            ModelError: A schedule of another family.
        """
        if str(config.get("_class_name", "")).startswith("EDM") or config.get("trained_betas") is not None:
            kind = config.get("_class_name")
            raise ModelError(f"the model's scheduler ({kind}) is not SDXL's: noise levels of its own are not read")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def training_sigmas(self) -> Levels:
        """Return sigma at every training timestep, ``[num_train_timesteps]``, growing, unitless.

        Source: Ho et al. 2020 (arXiv:2006.11239) for the betas; Karras et al. 2022 (arXiv:2206.00364), where
        ``sigma = sqrt((1 - alpha_bar) / alpha_bar)`` makes latents ``x0 + sigma * noise``; Lin et al. 2023
        (arXiv:2305.08891), algorithm 1, for zero terminal SNR.
        """
        return _training_sigmas(self)


@lru_cache(maxsize=8)
def _training_sigmas(schedule: NoiseSchedule) -> Levels:
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    ends = (schedule.beta_start**power, schedule.beta_end**power)
    betas = torch.linspace(*ends, schedule.num_train_timesteps, dtype=torch.float32) ** (1 / power)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if schedule.rescale_betas_zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alpha_bar[-1] = LAST_ALPHA_BAR
    return (((1 - alpha_bar) / alpha_bar) ** 0.5).double().numpy()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The noise levels one image passes through, one for each network call.

    Attributes:
        timesteps: What the network is told at each call, ``[calls]``.
        sigmas: Noise level before each call and after the last, ``calls + 1`` of them.
        initial_scale: Standard deviation of the starting latents.
        inner: For samplers that jump past the next level and come back: where to, for each call.
        starts: The first call of each step; a step may take several. One call a step if not given.
    """

    timesteps: Tensor
    sigmas: tuple[float, ...]
    initial_scale: float
    inner: tuple[float, ...] = ()
    starts: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.starts:
            object.__setattr__(self, "starts", range(len(self.timesteps)))

    def __len__(self) -> int:
        return len(self.timesteps)
