"""Every mode with every sampler ends at diffusers' latents: 1e-3 relative at most (1e-5 here), float32.

The random model runs the whole matrix at 64 px; the trained one, at its own size, shows that nothing hides in the
small. ``docs/parity.md`` has the figures: ``python -m tests.parity.table`` makes it.
"""

import pytest

from impasto.engine.engine import Engine
from impasto.engine.samplers import SAMPLERS
from impasto.models.catalog import BUILTIN_FOLDER
from tests.parity.modes import DIFFERENT, MODES, RELATIVE, TIGHT, Models, asked, difference, our_latents, their_latents
from tests.random_sdxl import save_random_inpaint, save_random_refiner, save_random_sdxl

SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Models:
    """A base, an inpainting model and a refiner with random weights."""
    folder = tmp_path_factory.mktemp("modes")
    return Models(
        save_random_sdxl(folder / "base"),
        save_random_inpaint(folder / "inpaint"),
        save_random_refiner(folder / "refiner"),
    )


@pytest.fixture(scope="session")
def engines(models) -> dict[str, Engine]:
    """Our engines on those: the base with the refiner, and the inpainting model."""
    return {
        "base": Engine.load(str(models.base), refiner=str(models.refiner), device="cpu", dtype="float32"),
        "inpaint": Engine.load(str(models.inpaint), device="cpu", dtype="float32"),
    }


@pytest.fixture(scope="session")
def trained() -> Engine:
    """Our engine on the model we ship."""
    return Engine.load("builtin", device="cpu", dtype="float32")


def assert_equal(engine: Engine, models: Models, mode: str, bound: float = TIGHT, **values) -> None:
    """Compare every image of a request with diffusers'."""
    request = asked(mode, **values)
    ours, theirs = our_latents(engine, request), their_latents(models, mode, request)
    for a, b in zip(ours, theirs, strict=True):
        assert difference(a, b) <= bound


def engine_of(engines: dict[str, Engine], mode: str) -> Engine:
    return engines["inpaint" if MODES[mode].needs == "inpaint" else "base"]


def skip_where_diffusers_errs(mode: str, sampler: str, steps: int) -> None:
    if mode == "second pass" and steps == 1:
        pytest.skip("diffusers refuses: 0.3 of one step is no step; we run one")
    if (sampler, mode) in DIFFERENT and steps > 1:
        pytest.skip(DIFFERENT[sampler, mode])


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_with_every_sampler(engines, models, mode, sampler, steps):
    """The final latents are diffusers', guidance 5."""
    skip_where_diffusers_errs(mode, sampler, steps)
    assert_equal(engine_of(engines, mode), models, mode, **SMALL, scheduler=sampler, num_inference_steps=steps)


@pytest.mark.parametrize("guidance", [0, 1])
@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("mode", MODES)
def test_without_guidance(engines, models, mode, sampler, guidance):
    """Guidance 0 and 1 are off, in both networks."""
    assert_equal(
        engine_of(engines, mode), models, mode, **SMALL,
        scheduler=sampler, num_inference_steps=4, guidance_scale=guidance,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 104)])
@pytest.mark.parametrize("mode", MODES)
def test_four_images_of_any_shape(engines, models, mode, size):
    """Image i is diffusers' picture of seed + i."""
    width, height = size
    assert_equal(
        engine_of(engines, mode), models, mode, width=width, height=height, num_inference_steps=4, num_images=4
    )


@pytest.mark.parametrize("negative", ["", "blue"])
@pytest.mark.parametrize("mode", ["ensemble", "second pass"])
def test_negative_prompts_reach_the_refiner(engines, models, mode, negative):
    """Empty and given, as absent is zeros in the base and the empty prompt in the refiner."""
    assert_equal(engines["base"], models, mode, **SMALL, num_inference_steps=5, negative_prompt=negative)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("mode", ["text-to-image", "image-to-image", "inpainting"])
def test_the_trained_model_at_its_own_size(trained, mode, sampler):
    """The same at 512 px with the model we ship."""
    models = Models(BUILTIN_FOLDER)
    assert_equal(trained, models, mode, RELATIVE, width=512, height=512, scheduler=sampler, num_inference_steps=4)


def test_the_comparison_can_fail(engines, models):
    """Another strength, another seed, another hand-over are other latents by far."""
    same = {**SMALL, "num_inference_steps": 5}
    for mode, change in (
        ("image-to-image", {"strength": 0.9}),
        ("inpainting", {"seed": 8}),
        ("ensemble", {"high_noise_frac": 0.4}),
        ("second pass", {"aesthetic_score": 1.0}),
    ):
        [ours] = our_latents(engines["base"], asked(mode, **same, **change))
        [theirs] = their_latents(models, mode, asked(mode, **same))
        assert difference(ours, theirs) > TIGHT, mode
