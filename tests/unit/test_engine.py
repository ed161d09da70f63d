"""The engine's promises, on a tiny random SDXL: rows join and leave, fail alone, and never change each other."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.engine import placement
from impasto.engine.accel import choose_device, choose_dtype
from impasto.engine.conditioning import Embedding, PromptCache, size_ids
from impasto.engine.engine import Engine
from impasto.engine.latents import latent_shape, noise, seeded
from impasto.engine.placement import choose_devices, choose_dtypes
from impasto.engine.samplers import SAMPLERS
from impasto.engine.sigmas import NoiseSchedule
from impasto.errors import ConfigError, InvalidInput, LoraError, ModelError
from impasto.models.networks import Dtypes
from impasto.models.text import Prompt
from impasto.types import Failed, Finished, GenerationRequest, ImageReady, LoraRef, Progress
from tests.random_sdxl import save_random_sdxl

SINGLE_PIXEL = 1  # of 255: most that batch-mates may change


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def engine(model_folder):
    return Engine.load(str(model_folder), device="cpu", dtype="float32")


def request(prompt="a fox", **fields) -> GenerationRequest:
    small = {"prompt": prompt, "width": 512, "height": 512, "num_inference_steps": 3, "seed": 1}
    return GenerationRequest(**(small | fields))


def run(engine, *requests) -> dict[str, list]:
    """Run requests together and return their events by id ``0``, ``1``, …"""
    for i, item in enumerate(requests):
        engine.submit(item, str(i))
    events: dict[str, list] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def pictures(events) -> list[np.ndarray]:
    return [np.asarray(event.image).astype(int) for event in events if isinstance(event, ImageReady)]


def test_events_come_in_order_progress_images_finished(engine):
    """A caller can draw a progress bar and save pictures from the events alone."""
    events = list(engine.generate(request(num_images=2, seed=40)))
    kinds = [type(event) for event in events]
    assert kinds == [Progress] * 3 + [ImageReady] * 2 + [Finished]
    assert [(event.step, event.total) for event in events[:3]] == [(1, 3), (2, 3), (3, 3)]
    assert [(event.index, event.seed) for event in events[3:5]] == [(0, 40), (1, 41)]
    assert all(event.seconds > 0 for event in [*events[:3], events[-1]])


def test_a_drawn_seed_is_reported_and_gives_the_picture_again(engine):
    """Seed -1 draws one; the event says which, and that one repeats the picture."""
    [first] = [event for event in engine.generate(request(seed=-1)) if isinstance(event, ImageReady)]
    [again] = [event for event in engine.generate(request(seed=first.seed)) if isinstance(event, ImageReady)]
    assert first.seed >= 0
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))


MIXED = [
    request("a fox", num_inference_steps=5, seed=1),
    request("a cat", num_inference_steps=2, seed=2, guidance_scale=0),
    request("a dog on a blue background", negative_prompt="red", num_inference_steps=3, seed=3, guidance_scale=9.5),
    request("a frog", num_inference_steps=4, seed=4, num_images=3),
    request("a panda", num_inference_steps=2, seed=5, width=576),
    request("a pizza", num_inference_steps=3, seed=6, scheduler="dpmpp_2m_sde"),
    request("a star", num_inference_steps=3, seed=7, scheduler="heun", guidance_rescale=0.7),
]


def test_pictures_do_not_depend_on_their_neighbours(engine):
    """Seven mixed requests run together give the pictures they give alone, to one 255th."""
    together = run(engine, *MIXED)
    for i, item in enumerate(MIXED):
        alone = pictures(engine.generate(item))
        for a, b in zip(pictures(together[str(i)]), alone, strict=True):
            assert np.abs(a - b).max() <= SINGLE_PIXEL


def test_a_request_joins_while_another_runs(engine):
    """Submitted after two steps of a long one, a short request ends first."""
    engine.submit(request(num_inference_steps=9), "long")
    order = [type(e) for _ in range(2) for e in engine.step()]
    engine.submit(request(num_inference_steps=2, seed=2), "short")
    finished = []
    while engine.busy:
        finished += [event.request_id for event in engine.step() if isinstance(event, Finished)]
    assert order == [Progress, Progress]
    assert finished == ["short", "long"]


def test_cancel_takes_effect_before_the_next_step(engine):
    """A cancelled request brings no further event, whether it was running or still queued."""
    engine.submit(request(num_inference_steps=9), "a")
    engine.step()
    engine.submit(request(seed=2), "b")
    assert engine.cancel("a")
    assert engine.cancel("b")
    assert not engine.cancel("a")
    assert not engine.busy
    assert engine.step() == []


def test_closing_the_iterator_cancels(engine):
    """Leaving the loop early leaves nothing behind."""
    events = engine.generate(request(num_inference_steps=9))
    next(events)
    events.close()
    assert not engine.busy


def test_a_request_that_cannot_start_fails_alone(engine, tmp_path):
    """A LoRA that is not there is that request's error only."""
    events = run(engine, request(loras=(LoraRef(str(tmp_path / "no.safetensors")),)), request(seed=2))
    [failed] = events["0"]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, LoraError)
    assert isinstance(events["1"][-1], Finished)


def test_a_row_that_breaks_the_batch_fails_alone(engine, monkeypatch):
    """When a shared call raises, its rows are tried one by one and only the guilty one fails."""
    predict = engine._model.base.predict

    def refuse(latents, timesteps, tokens, pooled, time_ids):
        if time_ids.shape[0] > 2 or float(pooled.abs().sum()) == marker:
            raise RuntimeError("out of memory")
        return predict(latents, timesteps, tokens, pooled, time_ids)

    bad, good = request("bad", guidance_scale=0), request("good", seed=2)
    marker = float(engine._model.encode(Prompt("bad"))[1].abs().sum())
    monkeypatch.setattr(type(engine._model.base), "predict", lambda _, *inputs: refuse(*inputs))
    events = run(engine, bad, good)
    assert isinstance(events["0"][-1], Failed)
    assert isinstance(events["1"][-1], Finished)


def test_generate_raises_what_went_wrong(engine, tmp_path):
    """The library's simple loop needs no check for failure events."""
    with pytest.raises(LoraError, match="not found"):
        list(engine.generate(request(loras=(LoraRef(str(tmp_path / "no.safetensors")),))))


def test_two_loops_over_one_engine_lose_nothing(engine):
    """Interleaved ``generate`` iterators each get all of their own events."""
    first, second = engine.generate(request(seed=1)), engine.generate(request(seed=2, num_inference_steps=5))
    seen = [[next(first)], [next(second)]]
    seen[0] += list(first)
    seen[1] += list(second)
    for events, steps in zip(seen, (3, 5), strict=True):
        assert [type(event) for event in events] == [Progress] * steps + [ImageReady, Finished]


def test_the_same_id_twice_is_refused(engine):
    """Two requests may not share an id."""
    engine.submit(request(), "a")
    with pytest.raises(ValueError, match="already here"):
        engine.submit(request(), "a")


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_stays_close(model_folder, engine, dtype):
    """bfloat16 weights give nearly the float32 picture: no overflow, nothing black."""
    half = Engine.load(str(model_folder), device="cpu", dtype=dtype)
    [a], [b] = pictures(engine.generate(request())), pictures(half.generate(request()))
    assert np.abs(a - b).mean() < 8


def test_noise_depends_on_the_seed_alone():
    """The first numbers of seed 7 are the same for ever: they name pictures."""
    shape = latent_shape(width=512, height=640)
    drawn = noise(shape, seeded(7))
    assert drawn.shape == (4, 80, 64)
    assert torch.equal(drawn, noise(shape, seeded(7)))
    assert not torch.equal(drawn, noise(shape, seeded(8)))
    assert drawn.flatten()[:3].tolist() == pytest.approx([-0.8201, 0.3956, 0.8989], abs=1e-4)


def test_size_ids_put_heights_before_widths():
    """Original size, crop corner, target size."""
    assert size_ids(width=768, height=512).tolist() == [512, 768, 0, 0, 512, 768]


def test_a_long_prompt_is_read_to_its_end(engine):
    """Words behind the first 75 tokens change the picture; windows are whole, and a short batch-mate is not changed."""
    short, long = "a b " * 30, "a b " * 45
    lengths = [len(engine._model.encode(Prompt(prompt))[0]) for prompt in ("", short, long, long * 2)]
    assert lengths == [77, 77, 154, 231]
    together = run(engine, request(long), request(long + "fox"), request(short), request(short, negative_prompt=long))
    one, other, third, fourth = (pictures(together[str(i)])[0] for i in range(4))
    assert np.abs(one - other).mean() > 0.03  # two random networks in a row pass little of one word on
    for picture, item in ((third, request(short)), (fourth, request(short, negative_prompt=long))):
        assert np.abs(picture - pictures(engine.generate(item))[0]).max() <= SINGLE_PIXEL


def test_a_prompt_beyond_all_windows_is_an_error_that_counts(engine):
    """Nothing is cut in silence."""
    with pytest.raises(InvalidInput, match="prompt has 1510 tokens; at most 1500"):
        list(engine.generate(request("a " * 1510)))


def test_prompts_are_encoded_once_until_the_cache_is_full():
    """The least recently used goes first, and other weights are another entry."""
    encoded = []

    def encode(prompt):
        encoded.append(prompt.text)
        return Embedding(torch.zeros(1, 1), torch.zeros(1))

    cache = PromptCache(encode, budget=16)  # two of them
    for prompt, weights in [("a", ()), ("a", ()), ("b", ()), ("a", ()), ("c", ()), ("b", ()), ("c", ("lora",))]:
        cache.embed(Prompt(prompt), weights)
    assert encoded == ["a", "b", "c", "b", "c"]


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_every_sampler_reports_its_steps_and_draws(engine, scheduler):
    """Whatever the number of network calls behind a step, progress ends at the number asked for."""
    events = list(engine.generate(request(scheduler=scheduler, num_inference_steps=4)))
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].step == progress[-1].total == 4
    assert [event.step for event in progress] == sorted(event.step for event in progress)
    [picture] = pictures(events)
    assert picture.std() > 1


@pytest.mark.parametrize(
    "field", [{"prediction_type": "sample"}, {"timestep_spacing": "odd"}, {"beta_schedule": "cosine"}]
)
def test_a_schedule_we_cannot_follow_is_an_error(field):
    """Never a silently wrong picture."""
    with pytest.raises(ModelError, match=next(iter(field))):
        NoiseSchedule.from_config(field | {"unrelated": 1})


def test_devices_and_dtypes_are_chosen_by_name():
    """auto fits the machine; nonsense is an error."""
    assert choose_device("cpu").type == "cpu"
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16
    with pytest.raises(ConfigError, match="quantum"):
        choose_device("quantum")
    with pytest.raises(ConfigError, match="int4"):
        choose_dtype("int4", torch.device("cpu"))


def test_each_part_may_have_its_own_device_and_format():
    """A VAE in float32 beside a half-precision UNet, text encoders on the CPU beside a GPU."""
    devices = choose_devices("cpu,text=cpu")
    assert choose_dtypes("bfloat16,vae=float32", devices) == Dtypes(torch.bfloat16, torch.float32, torch.bfloat16)
    assert choose_dtypes("auto,text=float16", devices) == Dtypes(torch.float32, torch.float32, torch.float16)
    assert choose_dtypes("vae=bfloat16", devices).vae is torch.bfloat16
    for wrong in ("bfloat16,float32", "bfloat16,head=float32", "float32,vae="):
        with pytest.raises(ConfigError, match="dtype"):
            choose_dtypes(wrong, devices)


@pytest.mark.parametrize("has", [True, False])
def test_a_format_that_the_processor_has_to_imitate_is_warned_of(has, monkeypatch, caplog):
    """Once for each format, with the remedy; not where it has it, nor for float32."""
    monkeypatch.setattr(placement, "_multiplies", lambda _: has)
    choose_dtypes("bfloat16,vae=float32", choose_devices("cpu"))
    choose_dtypes("auto", choose_devices("cpu"))
    told = [record.getMessage() for record in caplog.records]
    assert [("bfloat16" in line, "dtype=float32" in line) for line in told] == ([] if has else [(True, True)])


def test_a_mixture_of_formats_draws_nearly_the_same(model_folder, engine):
    """The parts hand float32 to each other."""
    mixed = Engine.load(str(model_folder), device="cpu", dtype="float32,text=bfloat16,vae=bfloat16")
    [a], [b] = pictures(engine.generate(request())), pictures(mixed.generate(request()))
    assert np.abs(a - b).mean() < 8


def drop_a_tensor(file):
    """Take the first tensor out of a file; the libraries would fill in random numbers."""
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99), "unet cannot be loaded"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae has no .safetensors"),
        (lambda f: drop_a_tensor(f / "unet/diffusion_pytorch_model.safetensors"), "unet: 1 tensors missing"),
        (lambda f: drop_a_tensor(f / "text_encoder/model.safetensors"), "text_encoder: 1 tensors missing"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "scheduler_config.json cannot be read"),
    ],
)
def test_a_damaged_model_names_the_part(tmp_path, damage, phrase):
    """Which file to fetch again is in the message."""
    folder = save_random_sdxl(tmp_path / "m")
    damage(folder)
    with pytest.raises(ModelError, match=phrase):
        Engine.load(str(folder), device="cpu")
