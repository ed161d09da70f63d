"""Every sampler walks diffusers' path: the same timesteps, and the same latents to 1e-3 relative.

The network is made up (smooth, dependent on latents and timestep), so that thousands of steps cost seconds. The whole
pipeline is compared in ``test_pipeline.py``.
"""

import diffusers
import pytest
import torch

from impasto.engine.samplers import SAMPLERS
from impasto.engine.samplers.moment import Moment, denoise, rescaled, scale_input
from impasto.engine.sigmas import SPACINGS, NoiseSchedule

RELATIVE = 1e-3
STEPS = [1, 2, 3, 4, 7, 14, 15, 20, 30, 50]

REFERENCES = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lms_karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "tcd": ("TCDScheduler", {"clip_sample": False}),
}


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth stand-in: what is noise in unit-variance latents, more of it at high timesteps."""
    return torch.tanh(x * (0.5 + t / 2000) + 0.1 * torch.roll(x, 1, -1))


def reference_class(name: str):
    """The diffusers class that a sampler of ours equals, and its options."""
    kind, options = REFERENCES[name]
    return getattr(diffusers, kind), options


def reference(name: str, schedule: NoiseSchedule, **options):
    kind, extra = reference_class(name)
    config = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "timestep_spacing": schedule.timestep_spacing,
        "steps_offset": schedule.steps_offset,
        "prediction_type": schedule.prediction_type,
    }
    if schedule.set_alpha_to_one is not None:
        config["set_alpha_to_one"] = schedule.set_alpha_to_one
    return kind.from_config(config, **extra, **options)


def theirs(name: str, schedule: NoiseSchedule, steps: int, seed: int) -> torch.Tensor:
    """Walk the reference as its pipelines do; return the final latents."""
    scheduler = reference(name, schedule)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **({"generator": generator} if takes_generator else {})).prev_sample
    return x[0]


def ours(name: str, schedule: NoiseSchedule, steps: int, seed: int) -> torch.Tensor:
    """Walk our sampler as the engine does; return the final latents in the reference's scale."""
    sampler = SAMPLERS[name]
    path = sampler.plan(schedule, steps)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(1, 4, 8, 8, generator=generator)[0]  # noqa: E731
    x, memory = draw() * path.initial_scale, ()
    for call in range(len(path)):
        sigma = torch.tensor([path.sigmas[call]])
        output = network(scale_input(x[None], sigma), path.timesteps[call])
        clean = denoise(x[None], output, sigma, schedule.prediction_type)[0]
        x, memory = sampler.step(Moment(x, clean, call, path, memory, draw))
    return x


def unit_scale(name: str, schedule: NoiseSchedule, steps: int, x: torch.Tensor) -> torch.Tensor:
    """Samplers that end above zero noise end in scaled-down latents at diffusers; bring ours there."""
    end = SAMPLERS[name].plan(schedule, steps).sigmas[-1]
    return x / (end**2 + 1) ** 0.5


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() / b.abs().max() <= RELATIVE


def test_every_sampler_has_a_reference():
    """A new sampler needs a line here."""
    assert set(REFERENCES) == set(SAMPLERS)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", REFERENCES)
def test_the_final_latents_are_the_same(name, prediction_type, steps):
    """With SDXL's schedule, from 1 to 50 steps, fresh noise from the same generator included."""
    if name == "pndm" and prediction_type == "v_prediction":
        pytest.skip("diffusers mixes velocities of different noise levels here; the paper, and we, mix noises")
    schedule = NoiseSchedule(prediction_type=prediction_type, set_alpha_to_one=False)
    assert_close(unit_scale(name, schedule, steps, ours(name, schedule, steps, 5)), theirs(name, schedule, steps, 5))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", REFERENCES)
def test_every_spacing_gives_the_same_timesteps(name, spacing):
    """What the network is told, call by call."""
    schedule = NoiseSchedule(timestep_spacing=spacing)
    scheduler = reference(name, schedule)
    scheduler.set_timesteps(20)
    told = SAMPLERS[name].plan(schedule, 20).timesteps
    torch.testing.assert_close(told, scheduler.timesteps.float(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["euler", "euler_a", "heun", "dpmpp_2m", "unipc", "lms"])
def test_every_spacing_ends_at_the_same_latents(name, spacing):
    """The other two spacings, for samplers that follow the model's."""
    schedule = NoiseSchedule(timestep_spacing=spacing)
    assert_close(ours(name, schedule, 12, 5), theirs(name, schedule, 12, 5))


@pytest.mark.parametrize("name", ["euler", "euler_a"])
def test_zero_terminal_snr(name):
    """Rescaled betas and trailing steps, as zero-SNR models ask for."""
    schedule = NoiseSchedule(
        timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction", steps_offset=0
    )
    scheduler = reference(name, schedule, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(10)
    path = SAMPLERS[name].plan(schedule, 10)
    torch.testing.assert_close(torch.tensor(path.sigmas), scheduler.sigmas, rtol=1e-4, atol=1e-4)


def test_the_comparison_can_fail():
    """Two different samplers do not end at the same latents: the tolerance is no rubber stamp."""
    schedule = NoiseSchedule()
    with pytest.raises(AssertionError):
        assert_close(ours("euler", schedule, 10, 5), theirs("dpmpp_2m", schedule, 10, 5))


def test_guidance_rescale_equals_the_reference():
    """``rescale_noise_cfg`` of diffusers, for rows with amounts of their own."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours_ = rescaled(a, b, torch.tensor([0.0, 0.3, 1.0]))
    for row, amount in enumerate([0.0, 0.3, 1.0]):
        expected = rescale_noise_cfg(a[row : row + 1], b[row : row + 1], guidance_rescale=amount)
        torch.testing.assert_close(ours_[row : row + 1], expected, rtol=1e-5, atol=1e-5)
