"""The engine's promises beyond plain text-to-image: pictures kept, previews, refiner, memory, approximations."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from impasto.engine.accel import Accel
from impasto.engine.engine import Engine
from impasto.engine.memory import Peak
from impasto.errors import InvalidInput, ModelError
from impasto.types import Failed, Finished, GenerationRequest, ImageReady, Preview, Progress
from tests.random_sdxl import save_random_refiner, save_random_sdxl

SIDE = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return str(save_random_sdxl(root / "base")), str(save_random_refiner(root / "refiner"))


@pytest.fixture
def engine(folders) -> Engine:
    return Engine.load(folders[0], refiner=folders[1], device="cpu", dtype="float32")


def request(**fields) -> GenerationRequest:
    return GenerationRequest(
        **({"prompt": "a fox", "width": SIDE, "height": SIDE, "num_inference_steps": 6, "seed": 1} | fields)
    )


def picture(engine: Engine, asked: GenerationRequest) -> np.ndarray:
    [found] = [event.image for event in engine.generate(asked) if isinstance(event, ImageReady)]
    return np.asarray(found).astype(int)


def painting() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def half_mask() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (30, 0, SIDE, SIDE))
    mask.paste(128, (27, 0, 30, SIDE))
    return mask


@pytest.mark.parametrize("refine", ["no_refiner", "expert_ensemble_refiner", "base_image_refiner"])
def test_kept_pixels_come_back_bit_identical(engine, refine):
    """Black in the mask is the start picture to the bit, whatever else runs; white is new."""
    found = picture(engine, request(image=painting(), mask_image=half_mask(), strength=0.9, refine=refine))
    before = np.asarray(painting()).astype(int)
    assert (found[:, :27] == before[:, :27]).all()
    assert np.abs(found[:, 30:] - before[:, 30:]).mean() > 5


def test_progress_counts_the_steps_that_run(engine):
    """0.5 of ten steps from a picture, and a second pass on top: five and three."""
    asked = request(image=painting(), strength=0.5, num_inference_steps=10, refine="base_image_refiner")
    progress = [event for event in engine.generate(asked) if isinstance(event, Progress)]
    assert [(event.step, event.total) for event in progress] == [(i + 1, 8) for i in range(8)]


def test_one_step_runs_however_small_the_strength(engine):
    """0.05 of ten steps rounds to none elsewhere."""
    asked = request(image=painting(), strength=0.05, num_inference_steps=10)
    assert [event.total for event in engine.generate(asked) if isinstance(event, Progress)] == [1]


def test_weak_strengths_stay_near_the_start_picture(folders):
    """Strength is a distance: 0.1 is nearer than 0.9 (the model we ship; a random one draws no pictures)."""
    engine = Engine.load("builtin", device="cpu", dtype="float32")
    start = Image.new("RGB", (256, 256), (40, 90, 200))
    start.paste((220, 40, 40), (80, 80, 176, 176))
    asked = request(prompt="a green frog", width=256, height=256, image=start)
    near, far = (
        np.abs(picture(engine, replace(asked, strength=strength, num_inference_steps=10)) - np.asarray(start)).mean()
        for strength in (0.1, 0.9)
    )
    assert near < 20 < 2 * near < far


def test_previews_come_when_asked_for(engine):
    """Every second step of every image, an eighth of the size; none unasked, none after the last step."""
    events = list(engine.generate(request(num_images=2), preview_every=2))
    previews = [event for event in events if isinstance(event, Preview)]
    assert [(event.index, event.step) for event in previews] == [(0, 2), (1, 2), (0, 4), (1, 4)]
    assert all(event.image.size == (SIDE // 8, SIDE // 8) for event in previews)
    assert not [event for event in engine.generate(request()) if isinstance(event, Preview)]


def test_the_last_preview_resembles_the_picture():
    """Colours fitted to the VAE, not guessed: close to the finished picture scaled down (the model we ship)."""
    engine = Engine.load("builtin", device="cpu", dtype="float32")
    asked = request(prompt="a red apple on a blue background", width=256, height=256, num_inference_steps=8)
    events = list(engine.generate(asked, preview_every=7))
    [preview] = [event.image for event in events if isinstance(event, Preview)]
    [final] = [event.image for event in events if isinstance(event, ImageReady)]
    small = np.asarray(final.resize(preview.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(preview).astype(int) - small).mean() < 16
    assert small.std() > 16, "a flat picture would resemble any flat preview"


def test_a_refiner_must_be_there_to_be_asked_for(folders):
    """The field is named, and the others go on."""
    engine = Engine.load(folders[0], device="cpu", dtype="float32")
    engine.submit(request(refine="expert_ensemble_refiner"), "bad")
    engine.submit(request(), "good")
    events = []
    while engine.busy:
        events += engine.step()
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request_id == "bad" and isinstance(failed.error, InvalidInput) and failed.error.field == "refine"
    assert [event.request_id for event in events if isinstance(event, Finished)] == ["good"]


def test_models_in_the_wrong_place_are_named(folders):
    """A refiner starts no pictures, and a base refines none."""
    with pytest.raises(ModelError, match="is an SDXL refiner"):
        Engine.load(folders[1], device="cpu")
    with pytest.raises(ModelError, match="is not a refiner"):
        Engine.load(folders[0], refiner=folders[0], device="cpu")


def test_the_refiner_shares_the_second_encoder_and_the_vae(engine, folders):
    """Only its UNet is loaded besides."""
    assert engine._model.text.widths[-1] == engine._model.refiner.context_width
    assert [type(part).__name__ for part in engine._model.encoders] == ["CLIPTextModel", "CLIPTextModelWithProjection"]


@pytest.mark.parametrize("at", [1, 5])
def test_cancel_takes_effect_before_the_next_step_in_either_stage(engine, at):
    """In the base's steps and in the refiner's."""
    calls = []
    for denoiser in (engine._model.base, engine._model.refiner):
        forward = denoiser.unet.forward
        denoiser.unet.forward = lambda *args, forward=forward, **options: calls.append(1) or forward(*args, **options)
    request_id = engine.submit(request(refine="expert_ensemble_refiner"))
    for _ in range(at):
        engine.step()
    assert engine.cancel(request_id)
    done = len(calls)
    assert engine.step() == [] and not engine.busy
    assert len(calls) == done == at


@pytest.mark.parametrize("scheduler", ["euler_a", "dpmpp_sde"])
def test_a_failed_shared_call_changes_no_picture(folders, scheduler, monkeypatch):
    """Rows that are tried again draw the noise they would have drawn."""
    engine = Engine.load(folders[0], device="cpu", dtype="float32")
    asked = [request(scheduler=scheduler, seed=seed) for seed in (1, 2)]
    alone = [picture(engine, item) for item in asked]
    forward = engine._model.base.unet.forward

    def crowded(sample, *args, **options):
        if len(sample) > 2:
            raise RuntimeError("too many")
        return forward(sample, *args, **options)

    monkeypatch.setattr(engine._model.base.unet, "forward", crowded)
    for i, item in enumerate(asked):
        engine.submit(item, str(i))
    found = {}
    while engine.busy:
        found |= {e.request_id: np.asarray(e.image) for e in engine.step() if isinstance(e, ImageReady)}
    assert len(found) == 2
    for i, expected in enumerate(alone):
        assert np.abs(found[str(i)].astype(int) - expected).max() <= 1


def test_an_image_that_can_not_be_decoded_ends_its_request_and_no_other(engine, monkeypatch):
    """Its sisters may be half way, in the same call or another: they go too, and the neighbour gets its picture."""
    decode, calls = engine._model.vae.decode, []

    def broken_once(latents):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no room")
        return decode(latents)

    monkeypatch.setattr(engine._model.vae, "decode", broken_once)
    engine._scheduler._max_batch = 2
    engine.submit(request(num_images=3, num_inference_steps=20), "a")
    engine.submit(request(height=72, num_inference_steps=30), "b")
    events = []
    while engine.busy:
        events += engine.step()
    assert [event.request_id for event in events if isinstance(event, Failed)] == ["a"]
    assert [event.request_id for event in events if isinstance(event, Finished)] == ["b"]


def test_a_preview_that_fails_costs_nobody_a_picture(engine, monkeypatch):
    """It is left out."""

    def broken(latents):
        raise RuntimeError("no room")

    monkeypatch.setattr(engine._model.vae, "preview", broken)
    events = list(engine.generate(request(), preview_every=1))
    assert not [event for event in events if isinstance(event, Preview)]
    assert isinstance(events[-1], Finished)


def test_previews_count_steps_not_calls(engine):
    """Heun takes two calls a step."""
    events = list(engine.generate(request(scheduler="heun", num_inference_steps=4), preview_every=1))
    steps = [event.step for event in events if isinstance(event, Preview)]
    assert steps == sorted(set(steps)) and max(steps) <= 4


def test_a_cancelled_request_has_no_late_events(engine):
    """Not even those that waited for another caller."""
    loop = engine.generate(request(seed=2))
    engine.submit(request(), "gone")
    next(loop)
    engine.cancel("gone")
    loop.close()
    assert not [event for event in engine.step() if event.request_id == "gone"]


class Gauge:
    """Says that so many bytes are free, and that every call took a thousand."""

    def __init__(self, free: int) -> None:
        self.left = free

    def free(self) -> int:
        return self.left

    @contextmanager
    def measure(self):
        yield Peak(1000)


def rows_of_calls(engine: Engine, monkeypatch) -> list[int]:
    """Count the rows of each call from now on."""
    sizes: list[int] = []
    forward = engine._model.base.unet.forward

    def count(sample, *args, **options):
        sizes.append(len(sample))
        return forward(sample, *args, **options)

    monkeypatch.setattr(engine._model.base.unet, "forward", count)
    return sizes


def test_a_call_has_no_more_rows_than_memory_has_room_for(engine, monkeypatch):
    """Measured with one image first; then as many as fit; one at a time where nothing fits, and never none."""
    sizes = rows_of_calls(engine, monkeypatch)
    list(engine.generate(request(num_images=4, num_inference_steps=2)))
    assert sizes == [2, 6, 8], "one image is measured, the others follow in the same step"
    engine._gauge = engine._limits._gauge = Gauge(free=1)
    sizes.clear()
    list(engine.generate(request(num_images=4, num_inference_steps=2, height=72)))
    assert sizes == [2] * 8
    engine._gauge.left = 3000  # at 500 bytes a network row and a tenth to spare: five rows, two guided images
    sizes.clear()
    list(engine.generate(request(num_images=4, num_inference_steps=2, height=72)))
    assert sizes == [4, 4, 8], "four rows took 1000 bytes too, so eight fit by then"


def test_out_of_memory_is_tried_again_in_smaller_calls(engine, monkeypatch):
    """Nothing fails, and the next call of the kind is half as large."""
    sizes = rows_of_calls(engine, monkeypatch)
    counted = engine._model.base.unet.forward

    def small_device(sample, *args, **options):
        if len(sample) > 4:
            raise torch.OutOfMemoryError("no room")
        return counted(sample, *args, **options)

    monkeypatch.setattr(engine._model.base.unet, "forward", small_device)
    events = list(engine.generate(request(num_images=4, num_inference_steps=4)))
    assert len([event for event in events if isinstance(event, ImageReady)]) == 4
    assert max(sizes) <= 4
    assert sizes[-2:] == [4, 4] or sizes[-4:] == [2, 2, 2, 2]


def test_features_are_reused_between_full_calls(engine, monkeypatch):
    """Every third step is whole; the middle of the network is skipped in the others."""
    whole = []
    middle = engine._model.base.unet.mid_block.forward
    monkeypatch.setattr(
        engine._model.base.unet.mid_block, "forward", lambda *a, **k: whole.append(1) or middle(*a, **k)
    )
    exact = picture(engine, request(num_inference_steps=7))
    assert len(whole) == 7
    whole.clear()
    approximate = picture(engine, request(num_inference_steps=7, reuse_features=3))
    assert len(whole) == 3
    assert 0 < np.abs(exact - approximate).mean() < 40


def test_guidance_may_be_limited_to_an_interval_of_steps(engine, monkeypatch):
    """Outside the interval a step is one network row, not two."""
    sizes = rows_of_calls(engine, monkeypatch)
    list(engine.generate(request(num_inference_steps=10, guidance_start=0.2, guidance_end=0.6)))
    assert sizes == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]


def test_reuse_and_an_interval_agree(engine, monkeypatch):
    """Features of one half are not taken for two: guidance that sets in late makes a whole call."""
    whole = []
    middle = engine._model.base.unet.mid_block.forward
    monkeypatch.setattr(
        engine._model.base.unet.mid_block, "forward", lambda x, *a, **k: whole.append(len(x)) or middle(x, *a, **k)
    )
    list(engine.generate(request(num_inference_steps=6, guidance_start=0.3, reuse_features=6)))
    assert whole == [1, 2]


@pytest.mark.parametrize("offload", ["encoders", "all"])
def test_off_loading_changes_no_picture(folders, engine, offload):
    """On a CPU there is nowhere else to go; the coming and going itself must do no harm."""
    frugal = Engine.load(folders[0], refiner=folders[1], device="cpu", dtype="float32", accel=Accel(offload=offload))
    asked = request(image=painting(), strength=0.7, refine="base_image_refiner")
    assert (picture(frugal, asked) == picture(engine, asked)).all()


def test_sizes_below_the_wires_are_the_librarys(engine):
    """64 px here; the compatible routes have their own range."""
    assert picture(engine, request(width=64, height=72)).shape == (72, 64, 3)
    with pytest.raises(InvalidInput, match="width must be a multiple of 8"):
        request(width=65)
