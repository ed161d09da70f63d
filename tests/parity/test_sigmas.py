"""Our noise levels equal those of diffusers' EulerDiscreteScheduler."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from impasto.engine.samplers import denoised_from_epsilon, euler_step, scale_input
from impasto.engine.sigmas import SPACINGS, NoiseSchedule, trajectory

STEPS = [1, 2, 3, 7, 20, 29, 30, 50]


def reference(schedule: NoiseSchedule, steps: int) -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        timestep_spacing=schedule.timestep_spacing,
        steps_offset=schedule.steps_offset,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
def test_timesteps_and_sigmas_are_the_same(beta_schedule, spacing, steps):
    """Every spacing and step count gives diffusers' timesteps exactly, its sigmas and starting scale to 1e-6."""
    schedule = NoiseSchedule(timestep_spacing=spacing, beta_schedule=beta_schedule)
    theirs = reference(schedule, steps)

    ours = trajectory(schedule, steps)

    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    assert ours.initial_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    assert len(ours) == steps


def test_euler_walks_the_same_path():
    """Ten steps with a made-up network end where diffusers' Euler ends, to 1e-5."""
    schedule, steps = NoiseSchedule(), 10
    theirs, ours = reference(schedule, steps), trajectory(schedule, steps)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * ours.initial_scale
    network = lambda x, t: torch.tanh(x * 0.7 + t / 1000)  # noqa: E731

    x = start.clone()
    for t in theirs.timesteps:
        x = theirs.step(network(theirs.scale_model_input(x, t), t), t, x).prev_sample

    y = start.clone()
    for step in range(steps):
        sigma, sigma_next = ours.sigmas[step].expand(2), ours.sigmas[step + 1].expand(2)
        epsilon = network(scale_input(y, sigma), ours.timesteps[step])
        y = euler_step(y, denoised_from_epsilon(y, epsilon, sigma), sigma, sigma_next)

    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
