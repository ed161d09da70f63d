"""Calls run from a list of their operations: the same bits, the weights of now, and the plain way where it fails."""

import gc
import logging
import threading
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from impasto.engine import accel as switchboard
from impasto.engine.accel import Accel, accelerate, suited, trace_calls
from impasto.engine.engine import Engine
from impasto.models import blocked, native, reuse
from impasto.models.traced import CALLS, Traced
from impasto.types import GenerationRequest, ImageReady, LoraRef
from tests.random_sdxl import save_random_sdxl
from tests.unit.test_spread import _pixels, random_lora

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Layer(nn.Module):
    """Work that can be counted: Python sees a call, a list of operations does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.seen = 0
        self.requires_grad_(False)

    def forward(self, x):
        self.seen += 1
        return self.inner(x) * len(x)


def traced(layer: nn.Module, most: int = 8) -> Traced:
    return Traced(layer.parameters(), most)


def called(made: Traced, layer: nn.Module, x: torch.Tensor, times: int = CALLS):
    """The last of so many answers; the network is asked through Python at most ``CALLS`` + 1 times."""
    for _ in range(times):
        answer = made("it", layer, x)
    return answer


def test_a_kind_of_call_that_comes_back_is_run_without_python():
    """The same bits before and after, for each shape and format a list of its own."""
    layer, x = Layer(), torch.randn(3, 4)
    made = traced(layer)
    with torch.inference_mode():
        assert torch.equal(called(made, layer, x), layer(x)) and made.written == 1
        seen = layer.seen
        assert torch.equal(called(made, layer, 2 * x, 5), layer(2 * x)) and layer.seen == seen + 1
        assert torch.equal(called(made, layer, x[:2], CALLS + 1), layer(x[:2]))
        layer.double()
        assert called(made, layer, x.double(), CALLS + 1).dtype == torch.float64
    assert made.written == 3


def test_weights_are_those_of_now():
    """Edited in place they are seen; moved, the list is made anew."""
    layer, x = Layer(), torch.randn(3, 4)
    made = traced(layer)
    before = called(made, layer, x, CALLS + 1)
    layer.inner.weight.mul_(2.0)
    assert torch.equal(made("it", layer, x), layer(x)) and not torch.equal(before, layer(x))
    assert made.written == 1
    held = layer.inner.weight.data  # noqa: F841  # so that the new weight cannot lie in its place
    layer.inner.weight.data = torch.randn(4, 4)
    assert torch.equal(called(made, layer, x, CALLS + 1), layer(x)) and made.written == 2


def test_weights_of_equal_values_stay_two():
    """An optimiser of lists would make them one."""
    layer, x = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)).requires_grad_(False), torch.randn(3, 4)
    made = traced(layer)
    called(made, layer, x, CALLS + 1)
    layer[1].weight.mul_(3.0)
    assert torch.equal(made("it", layer, x), layer(x)) and made.written == 1


def test_what_is_named_otherwise_is_other_work():
    layer, x = Layer(), torch.randn(3, 4)
    made = traced(layer)
    called(made, layer, x, CALLS + 1)
    for _ in range(CALLS + 1):
        assert torch.equal(made("other", lambda x: layer(x) + 1, x), layer(x) + 1)


def test_few_lists_are_kept_and_none_outlives_its_owner():
    """The latest used stay, whatever else is called now and then; when all is dropped, so are the weights in them."""
    layer = Layer()
    made = traced(layer, most=2)
    for rows in (1, 2, 3):
        called(made, layer, torch.randn(rows, 4))
    assert made.written == 3
    called(made, layer, torch.randn(3, 4))
    assert made.written == 3
    for rows in range(4, 40):
        called(made, layer, torch.randn(rows, 4), CALLS - 1)
    called(made, layer, torch.randn(2, 4))
    assert made.written == 3
    called(made, layer, torch.randn(1, 4))
    assert made.written == 4
    gone = weakref.ref(layer.inner.weight)
    del layer, made
    gc.collect()
    assert gone() is None


def test_what_cannot_be_written_down_is_run_as_it_is(caplog):
    """Told once for its shape, and others are not held for it; an error of the work's own comes out as it is."""
    layer, x = Layer(), torch.randn(3, 4)
    made = traced(layer)

    def broken(x):
        raise RuntimeError("broken")

    with caplog.at_level(logging.WARNING):
        for _ in range(2 * CALLS):
            answer = made("it", lambda x: broken(x) if torch.jit.is_tracing() else layer(x), x)
    assert torch.equal(answer, layer(x)) and made.written == 0
    assert [record.message for record in caplog.records] == ["a call cannot be run as TorchScript: broken"]
    assert torch.equal(called(made, layer, x[:2], CALLS + 1), layer(x[:2])) and made.written == 1
    with pytest.raises(RuntimeError, match="broken"):
        called(traced(layer), broken, x)


def test_threads_may_call_at_once():
    """One writes the list down, the others do not wait for it."""
    layer, x = Layer(), torch.randn(3, 4)
    made, wrong = traced(layer), []
    right = layer(x)

    def many():
        wrong.extend(1 for _ in range(50) if not torch.equal(made("it", layer, x), right))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and made.written >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", [reuse.predict_whole, reuse.predict_full, reuse.predict_shallow])
def test_a_unet_gives_the_same_bits(tmp_path, dtype, work):
    """Whole, with its features kept, and from kept features; attention as it is on this machine."""
    unet = UNet2DConditionModel.from_pretrained(save_random_sdxl(tmp_path / "m") / "unet", dtype=dtype)
    accel = Accel(auto=True)
    accelerate(unet.requires_grad_(False), accel, CPU)
    made = trace_calls(unet, accel, CPU)
    assert made is not None
    shapes = ((1, 4, 16, 24), (1, 77, 40), (1, 24), (1, 6))
    sample, tokens, pooled, six = (torch.randn(shape, dtype=dtype) for shape in shapes)
    given = [sample, torch.tensor([500]), tokens, pooled, six]

    def call(sample, times, tokens, pooled, six, *more):
        return work(unet, sample, times, tokens, {"text_embeds": pooled, "time_ids": six}, *more)

    with torch.inference_mode():
        if work is reuse.predict_shallow:
            added = {"text_embeds": pooled, "time_ids": six}
            given.append(reuse.predict_full(unet, sample, given[1], tokens, added)[1])
        plain = call(*given)
        for _ in range(CALLS + 2):
            answer = made(work, call, *given)
    assert made.written == 1
    for one, other in zip(*((a if isinstance(a, tuple) else (a,)) for a in (plain, answer)), strict=True):
        assert torch.equal(one, other)


def test_attention_without_the_kernel_is_traced_as_it_is(monkeypatch):
    """Many keys, which go block by block, and few."""
    monkeypatch.setattr(native, "kernel", lambda: None)
    for keys in (16, 2 * blocked.MANY_KEYS):
        query, key, value = (torch.randn(1, 2, length, 32).bfloat16() for length in (70, keys, keys))
        made = Traced([])
        for _ in range(CALLS + 2):
            answer = made("it", native.attend, query, key, value)
        assert made.written == 1 and torch.equal(answer, blocked.attend(query, key, value))


@pytest.mark.parametrize("switches", ["torchscript", "torchscript,spread_rows"])
def test_pictures_are_the_plain_ones_while_loras_go_on_and_off(tmp_path, switches):
    """The engine's own path, whole and with features reused, on one thread and on two side by side."""
    folder = str(save_random_sdxl(tmp_path / "m"))
    lora = LoraRef(random_lora(folder, str(tmp_path / "l.safetensors")))
    threads = torch.get_num_threads()
    plain = Engine.load(folder, dtype="float32", accel=Accel.parse("channels_last"))
    torch.set_num_threads(2)
    fast = Engine.load(folder, dtype="float32", accel=Accel.parse(f"channels_last,{switches}"))
    torch.set_num_threads(threads)
    assert (fast._model.base.spread is not None) == ("spread_rows" in switches)

    def pixels(engine, loras, **more):
        request = GenerationRequest(
            prompt="a fox", width=64, height=64, seed=1, num_inference_steps=6, loras=loras, **more
        )
        return torch.stack([_pixels(e.image) for e in engine.generate(request) if isinstance(e, ImageReady)])

    for more in ({}, {"reuse_features": 2}):
        for loras in ((), (lora,), ()):
            apart = (pixels(plain, loras, **more) - pixels(fast, loras, **more)).abs().max()
            assert apart <= ("spread_rows" in switches)  # rows alone are rounded otherwise than rows together
    assert fast._model.base.traced.written >= 3
    assert plain._model.base.traced is None


def test_auto_traces_narrow_networks_on_a_cpu_alone(tmp_path, caplog):
    """And keeps nothing in Python beside: a trace would not see it change."""
    unet = UNet2DConditionModel.from_pretrained(save_random_sdxl(tmp_path / "m") / "unet")
    auto, asked = Accel(auto=True), Accel(torchscript=True)
    assert trace_calls(unet, auto, CPU) is not None and trace_calls(unet, asked, CPU) is not None
    assert trace_calls(unet, Accel(), CPU) is None
    assert trace_calls(unet, Accel(auto=True, compile=True), CPU) is None and not caplog.records
    assert trace_calls(unet, Accel(torchscript=True, static_shapes=True), CPU) is None
    assert trace_calls(unet, Accel(torchscript=True, offload="all"), CPU) is None
    assert caplog.text.count("torchscript is off") == 2
    assert trace_calls(unet, Accel(auto=True, offload="all"), CPU) is None
    unet.register_to_config(block_out_channels=(320, 640, 1280))
    assert trace_calls(unet, auto, CPU) is None
    ways = suited(auto, CPU, torch.float32, narrow=True)
    assert not ways.prepack and not ways.keep_prompts and suited(auto, CPU, torch.float32).keep_prompts
    caplog.clear()
    accelerate(unet, Accel.parse("torchscript,keep_prompts,prepack"), CPU)
    assert "keep_prompts, prepack: off, the network is traced" in caplog.text
    caplog.clear()
    assert not switchboard._cpu_ways(Accel.parse("torchscript,compile,native_attention"), CPU)
    assert "native_attention: off, the network is compiled" in caplog.text
