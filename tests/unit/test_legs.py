"""Modes as data: which network makes which calls."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from impasto.engine.legs import plan_legs
from impasto.engine.samplers import SAMPLERS
from impasto.engine.sigmas import NoiseSchedule
from impasto.types import LIMITS, REFINE_MODES, GenerationRequest

SCHEDULES = {"base": NoiseSchedule(), "refiner": NoiseSchedule()}
PICTURE = Image.new("RGB", (64, 64))


def legs(scheduler: str = "euler", **values):
    return plan_legs(GenerationRequest("a", scheduler=scheduler, **values), SAMPLERS[scheduler], SCHEDULES)


@given(
    scheduler=st.sampled_from(list(SAMPLERS)),
    steps=st.integers(1, 50),
    strength=st.floats(LIMITS.strength.low, 1),
    image=st.booleans(),
    refine=st.sampled_from(REFINE_MODES),
    share=st.floats(0, 1),
    refine_steps=st.none() | st.integers(1, 50),
)
def test_at_least_one_step_always_runs(scheduler, steps, strength, image, refine, share, refine_steps):
    """Whatever the strength and the hand-over: no empty leg, no leg out of its trajectory, levels that fall."""
    found = legs(
        scheduler, num_inference_steps=steps, strength=strength, image=PICTURE if image else None, refine=refine,
        high_noise_frac=share, refine_steps=refine_steps,
    )  # fmt: skip

    assert sum(leg.steps for leg in found) >= 1
    for leg in found:
        assert len(leg) >= 1
        assert 0 <= leg.first < leg.end <= len(leg.trajectory)
        assert leg.trajectory.sigmas[leg.first] > leg.trajectory.sigmas[leg.end]


@pytest.mark.parametrize(("steps", "strength", "run"), [(10, 0.05, 1), (1, 0.01, 1), (30, 0.8, 24), (4, 0.6, 2)])
def test_strength_is_the_share_of_the_steps_that_run(steps, strength, run):
    """Rounded down, as diffusers does, but never to nothing."""
    [leg] = legs(num_inference_steps=steps, strength=strength, image=PICTURE)
    assert leg.steps == run


def test_strength_means_nothing_without_a_picture():
    """Text-to-image runs every step."""
    [leg] = legs(num_inference_steps=10, strength=0.1)
    assert leg.steps == 10


def test_an_ensemble_shares_the_steps_out():
    """0.8 of the noise schedule is the base's, the rest the refiner's, and no step is lost or done twice."""
    base, refiner = legs(num_inference_steps=20, refine="expert_ensemble_refiner")
    assert (base.stage, refiner.stage) == ("base", "refiner")
    assert (base.steps, refiner.steps) == (16, 4)
    assert base.end == refiner.first
    assert not refiner.renoise


@pytest.mark.parametrize(("share", "stages"), [(0, ["refiner"]), (1, ["base"]), (0.5, ["base", "refiner"])])
def test_an_ensemble_may_be_one_network_alone(share, stages):
    """All of the schedule to one of them."""
    assert [leg.stage for leg in legs(refine="expert_ensemble_refiner", high_noise_frac=share)] == stages


def test_a_second_pass_has_a_schedule_of_its_own():
    """``refine_steps`` is its length; 0.3 of it is run, from finished latents noised again."""
    base, refiner = legs(num_inference_steps=10, refine="base_image_refiner", refine_steps=40)
    assert (base.steps, refiner.steps, refiner.renoise) == (10, 12, True)


def test_heun_is_never_handed_over_in_the_middle_of_a_step():
    """Its steps are two calls each."""
    base, refiner = legs("heun", num_inference_steps=20, refine="expert_ensemble_refiner")
    assert base.end in base.trajectory.starts
    assert base.end == refiner.first


def test_a_refiner_goes_on_where_a_base_of_another_schedule_stops():
    """Whatever spacing the refiner's own file names: one trajectory, no level left out or done twice."""
    schedules = {"base": NoiseSchedule(timestep_spacing="trailing"), "refiner": NoiseSchedule()}
    for steps in (1, 4, 20):
        asked = GenerationRequest("a", num_inference_steps=steps, refine="expert_ensemble_refiner")
        found = plan_legs(asked, SAMPLERS["euler"], schedules)
        assert sum(leg.steps for leg in found) == steps
        assert all(a.end == b.first and a.trajectory is b.trajectory for a, b in itertools.pairwise(found))
