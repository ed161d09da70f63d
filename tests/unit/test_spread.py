"""Rows divided among threads: the same answers, failures that come out, and threads that are left as they were."""

import threading
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from impasto.engine.accel import Accel, spread_rows
from impasto.engine.engine import Engine
from impasto.models.spread import Spread, parts_of
from impasto.types import GenerationRequest, ImageReady, LoraRef
from tests.random_sdxl import save_random_sdxl


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(st.integers(1, 64), st.integers(1, 64))
def test_parts_are_equal_and_leave_each_a_thread(rows, threads):
    """Equal, because all wait for the largest."""
    parts = parts_of(rows, threads)
    assert rows % parts == 0 and 1 <= parts <= min(rows, threads)
    if rows <= threads:
        assert parts == rows


@pytest.mark.usefixtures("two_threads")
def test_rows_come_back_in_their_order_each_from_its_own_thread():
    """One result or several; the threads of the caller, and of whoever comes later, are as before."""
    spread, seen = Spread(2), set()
    rows = torch.arange(6.0)[:, None]

    def work(these, beside):
        seen.add((threading.get_ident(), len(these), torch.get_num_threads()))
        return these * beside, these

    product, same = spread(work, rows, rows)
    assert torch.equal(product, rows**2) and torch.equal(same, rows)
    assert sorted(length for _, length, _ in seen) == [3, 3]
    assert len({thread for thread, _, _ in seen}) == 2
    assert {threads for _, _, threads in seen} == {1}
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.usefixtures("two_threads")
def test_rows_that_cannot_be_divided_are_done_here_with_every_thread():
    """One row, or three for two threads."""
    here = threading.get_ident()
    for count in (1, 3):
        seen = Spread(2)(lambda x: x * 0 + threading.get_ident() % 1000, torch.zeros(count, 1))
        assert (seen == here % 1000).all()


@pytest.mark.usefixtures("two_threads")
def test_one_parts_failure_is_raised_after_the_others_are_done():
    """So nobody edits weights that somebody still reads; the next call works."""
    spread, done = Spread(2), threading.Event()

    def work(rows):
        if rows[0] == 0:
            raise ValueError("row 0")
        done.wait(0.2)
        done.set()
        return rows

    with pytest.raises(ValueError, match="row 0"):
        spread(work, torch.arange(2))
    assert done.is_set()
    assert torch.equal(spread(lambda rows: rows + 1, torch.arange(2)), torch.tensor([1, 2]))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("wanted", [{}, {"reuse_features": 2}])
def test_pictures_are_the_plain_ones_with_and_without_loras(tmp_path, wanted):
    """Guided, two images, with prompts that are kept and features that are reused, while LoRAs go on and off."""
    folder = str(save_random_sdxl(tmp_path / "m"))
    lora = LoraRef(random_lora(folder, str(tmp_path / "l.safetensors")))
    plain = Engine.load(folder, dtype="float32")
    fast = Engine.load(folder, dtype="float32", accel=Accel.parse("spread_rows,keep_prompts"))
    assert fast._model.base.spread is not None and plain._model.base.spread is None

    def pixels(engine, loras):
        request = GenerationRequest(
            prompt="a fox", width=64, height=64, seed=1, num_inference_steps=4, num_images=2, loras=loras, **wanted
        )
        events = engine.generate(request)
        return torch.stack([_pixels(event.image) for event in events if isinstance(event, ImageReady)])

    without = pixels(plain, ())
    for loras in ((), (lora,), ()):
        exact, given = pixels(plain, loras), pixels(fast, loras)
        assert (exact - given).abs().max() <= 1
        assert (exact - without).abs().max() > 1 or not loras


@pytest.mark.usefixtures("two_threads")
def test_auto_divides_the_rows_of_narrow_networks_alone(tmp_path):
    """Wide ones have operations that are long enough to be divided, and asking is asking."""
    unet = UNet2DConditionModel.from_pretrained(save_random_sdxl(tmp_path / "m") / "unet")
    cpu, auto, asked = torch.device("cpu"), Accel(auto=True), Accel(spread_rows=True)
    assert spread_rows(unet, auto, cpu) is not None
    assert spread_rows(unet, Accel(), cpu) is None
    assert spread_rows(unet, replace(auto, compile=True), cpu) is None
    unet.register_to_config(block_out_channels=(320, 640, 1280))
    assert spread_rows(unet, auto, cpu) is None
    assert spread_rows(unet, asked, cpu) is not None


def random_lora(folder, path):
    torch.manual_seed(3)
    tensors = {}
    for name, module in UNet2DConditionModel.from_pretrained(f"{folder}/unet").named_modules():
        if isinstance(module, nn.Linear) and ".attentions." in name:
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features) * 0.3
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2) * 0.3
    save_file(tensors, path)
    return path


def _pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
