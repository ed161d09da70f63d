"""What only a CUDA device can show: graphs that follow LoRAs, measured memory, and the switches together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from impasto.engine.accel import Accel, accelerate, accelerate_vae
from impasto.engine.engine import Engine
from impasto.engine.graphs import Graphed
from impasto.engine.memory import BatchLimits, MemoryGauge
from impasto.lora.apply import Adapters
from impasto.models.reuse import predict_full, predict_shallow
from impasto.models.tiling import decode
from impasto.types import GenerationRequest, ImageReady, LoraRef
from tests.random_sdxl import save_random_sdxl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),  # torch's compiler uses what torch deprecates
]
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def unets(folder):
    """Two equal UNets on the device: one to accelerate, one to compare with."""
    return tuple(
        UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).requires_grad_(False).cuda()
        for _ in range(2)
    )


@pytest.fixture
def lora(unets, tmp_path) -> str:
    """A LoRA on every projection of every attention."""
    torch.manual_seed(3)
    tensors = {}
    for name, module in unets[0].named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_k", "to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features) * 0.3
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2) * 0.3
    save_file(tensors, tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


def inputs(rows=2, side=16, seed=0):
    """Random inputs ``sample, timesteps, tokens, added_cond``, on the device."""
    generator = torch.Generator().manual_seed(seed)
    added = {"text_embeds": torch.randn(rows, 24, generator=generator), "time_ids": torch.full((rows, 6), 512.0)}
    return (
        torch.randn(rows, 4, side, side, generator=generator).cuda(),
        torch.full((rows,), 500).cuda(),
        torch.randn(rows, 77, 40, generator=generator).cuda(),
        {name: tensor.cuda() for name, tensor in added.items()},
    )


@torch.inference_mode()
def answer(unet, **wanted):
    sample, timesteps, tokens, added = inputs(**wanted)
    return unet(sample, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)[0]


def relative(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def wearing(adapters, path, scale):
    return adapters.active(adapters.resolve([LoraRef(path, scale)]))


@pytest.mark.parametrize(
    "switches",
    [
        "cuda_graphs",
        "cuda_graphs,fuse_projections,channels_last",
        "compile",
        "compile,cuda_graphs,fuse_projections",
        "static_shapes",
        "static_shapes,cuda_graphs,fuse_projections,channels_last",
        "auto",
        "auto,cuda_graphs",
    ],
)
def test_loras_go_on_and_off_without_a_new_recording(unets, lora, switches):
    """Every LoRA, batch and size gives the plain UNet's answer; only another shape is recorded anew."""
    unet, plain = unets
    accelerate(unet, Accel.parse(switches), torch.device("cuda"))
    adapters, reference = Adapters({"unet": unet}), Adapters({"unet": plain})
    shapes = [{"rows": 2}, {"rows": 1}, {"rows": 4}, {"rows": 2, "side": 24}]
    for scale in (1.0, -0.5, 1.0):
        with wearing(adapters, lora, scale), wearing(reference, lora, scale):
            for seed, shape in enumerate(shapes):
                exact = answer(plain, seed=seed, **shape)
                assert relative(answer(unet, seed=seed, **shape), exact) <= 1e-3
    adapters.restore()
    reference.restore()

    assert relative(answer(unet), answer(plain)) <= 1e-3
    if "cuda_graphs" in switches:
        assert unet.forward.recorded == len(shapes)


@pytest.mark.parametrize("switches", ["auto", "vae_channels_last", "static_shapes", "static_shapes,vae_channels_last"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-1), (torch.float16, 2e-2)])
def test_a_faster_vae_gives_the_same_picture(folder, switches, dtype, most):
    """Two sizes, in every number format; what overflows is finite all the same, as it is decoded again in float32."""
    plain, fast = (
        AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, dtype=dtype).requires_grad_(False).cuda()
        for _ in range(2)
    )
    accelerate_vae(fast, Accel.parse(switches), torch.device("cuda"))
    for side in (16, 24):
        latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(side)).cuda()
        with torch.inference_mode():
            assert relative(decode(fast, latents, tiling=False), decode(plain, latents, tiling=False)) <= most
            assert decode(fast, latents * 1e4, tiling=False).isfinite().all()


def test_a_steady_loop_of_replayed_calls_allocates_nothing_new(unets):
    """After the first calls of a shape, a hundred more leave the device's memory as it was."""
    unet, _ = unets
    accelerate(unet, Accel(cuda_graphs=True), torch.device("cuda"))
    for _ in range(3):
        answer(unet)
    held = torch.cuda.memory_reserved()
    for _ in range(100):
        answer(unet)
    assert torch.cuda.memory_reserved() == held


def test_a_replay_leaves_earlier_results_alone():
    """What a call returned does not change when the next one runs, also in a tuple and from another mode."""
    graphed = Graphed(lambda x, extra: (x * 2, x + extra["y"]))
    one, two = torch.ones(8, device="cuda"), torch.full((8,), 5.0, device="cuda")
    with torch.inference_mode():
        first = graphed(one, {"y": one})
    second = graphed(two, {"y": one})

    assert graphed.recorded == 1
    assert [t[0].item() for t in (*first, *second)] == [2, 2, 10, 6]


def test_the_least_recently_used_shape_is_recorded_again():
    """No more than ``most`` recordings are kept."""
    graphed = Graphed(lambda x: x + 1, most=2)
    for size in (1, 2, 1, 3, 1):  # 3 pushes 2 out, not 1
        assert graphed(torch.zeros(size, device="cuda")).sum().item() == size
    assert graphed.recorded == 3
    graphed(torch.zeros(2, device="cuda"))
    assert graphed.recorded == 4


def test_forgotten_recordings_are_made_again():
    """After weights were moved a new recording reads them where they are now."""
    weight = torch.ones(4, device="cuda")
    held = {"weight": weight}
    graphed = Graphed(lambda x: x * held["weight"])
    x = torch.ones(4, device="cuda")
    graphed(x)
    held["weight"] = torch.full((4,), 3.0, device="cuda")
    graphed.forget()
    assert graphed(x)[0].item() == 3


def test_features_are_taken_along_under_graphs_too(unets):
    """``predict_full`` and ``predict_shallow`` work on a UNet whose calls are recorded, and can be recorded."""
    unet, plain = unets
    accelerate(unet, Accel(cuda_graphs=True), torch.device("cuda"))
    given = inputs()
    with torch.inference_mode():
        exact, _ = predict_full(plain, *given)
        output, features = predict_full(unet, *given)
        assert relative(output, exact) <= 1e-3
        assert relative(predict_shallow(unet, *given, features), exact) <= 1e-3
        full = Graphed(lambda *args: predict_full(unet, *args))
        for _ in range(2):
            output, features = full(*given)
        assert relative(output, exact) <= 1e-3
        assert relative(predict_shallow(unet, *given, features), exact) <= 1e-3


def test_the_gauge_sees_what_a_call_took():
    """256 MiB held for a moment, above 128 MiB that were there before; then nothing."""
    gauge = MemoryGauge(torch.device("cuda"))
    held = torch.ones(128 * MIB // 4, device="cuda")
    with gauge.measure() as peak:
        torch.ones(256 * MIB // 4, device="cuda")
    with gauge.measure() as idle:
        pass
    assert held.numel() and peak.bytes == 256 * MIB and idle.bytes == 0


def test_what_the_allocator_keeps_counts_as_free():
    """Memory that torch holds back for later can be used by the next call."""
    gauge = MemoryGauge(torch.device("cuda"))
    torch.cuda.empty_cache()
    before = gauge.free()
    torch.ones(512 * MIB // 4, device="cuda")
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= 512 * MIB
    assert gauge.free() == pytest.approx(before, abs=64 * MIB)


def test_the_limit_of_a_measured_call_does_not_run_out(unets):
    """As many rows as the limit allows fit into the memory that is left to the process."""
    gauge = MemoryGauge(torch.device("cuda"))
    limits = BatchLimits(gauge, 256)
    answer(unets[0], rows=4, side=64)
    with gauge.measure() as peak:
        answer(unets[0], rows=4, side=64)
    limits.learn("k", 4, peak.bytes)
    with gauge.measure() as large:
        answer(unets[0], rows=limits.limit("k"), side=64)
    assert large.bytes <= 1.25 * peak.bytes / 4 * limits.limit("k")


def test_pictures_decoded_beside_the_steps_are_the_same():
    """On a stream of its own, from latents that another stream has just written."""
    requests = {
        str(number): GenerationRequest("a red fox", width=256, height=256, num_inference_steps=2 + number, seed=number)
        for number in range(4)
    }
    pictures = []
    for beside in (False, True):
        engine = Engine.load("builtin", device="cuda", dtype="float32", accel=Accel(decode_beside=beside))
        for name, request in requests.items():
            engine.submit(request, name)
        events = []
        while engine.busy:
            events += engine.step()
        pictures.append({e.request_id: np.asarray(e.image, int) for e in events if isinstance(e, ImageReady)})
    assert pictures[0].keys() == pictures[1].keys() == requests.keys()
    assert max(np.abs(pictures[0][name] - pictures[1][name]).max() for name in requests) <= 1
