"""LoRA switches on CUDA: the same bits, few launches, no copies from the host of cached sets, own values at home."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from impasto.errors import LoraError
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.lora.contents import LoraContents
from impasto.lora.grouped import Group, _answers_in_float32, add_products, batches
from impasto.lora.keys import Target
from impasto.lora.merge import recipe
from impasto.lora.patch import LowRank
from impasto.types import LoraRef
from tests.unit.test_lora_grouped import recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]
HALVES = [torch.bfloat16, torch.float16]
WIDTH, LAYERS = 640, 4


def low_rank(rank, seed, dtype=torch.bfloat16, shape=(WIDTH, WIDTH)):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    return LowRank(down.to(dtype), torch.randn(shape[0], rank, generator=generator).to(dtype), 0.5)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return (
        nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH) for i in range(LAYERS)}).requires_grad_(False).cuda().bfloat16()
    )


@pytest.fixture
def library(tmp_path):
    """Four files, and what is read from them."""
    contents = {}
    for index in range(4):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(b"x")
        patches = {Target("unet", str(i), "weight"): low_rank(8, 10 * index + i) for i in range(LAYERS)}
        contents[path.resolve()] = LoraContents(patches)
    return list(map(str, contents)), lambda path, names, field: contents[path]


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def identical(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(640, 640), (10240, 1280), (1280, 2048)])
def test_the_bits_are_those_of_a_float32_sum_rounded_once(dtype, stored, shape):
    """As on a CPU: all but the few places next to the middle of two numbers equal the float64 sum, rounded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype).cuda()
    patch = low_rank(64, 1, stored, shape)
    got = torch.empty_like(weight)
    recipe([(patch, 0.7)], weight).write(got, weight)
    exact = weight.double() + 0.7 * patch.scale * (patch.up.cuda().double() @ patch.down.cuda().double())
    assert (got != exact.to(dtype)).float().mean() < 5e-3
    assert ((got.double() - exact).abs() <= exact.abs() * 2 * torch.finfo(dtype).eps + 1e-5).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(640, 640), (10240, 1280), (1280, 2048)])
def test_a_groups_bits_are_those_of_a_float32_sum_rounded_once(dtype, stored, shape):
    """Written together, with products of 16-bit halves on the tensor cores, as when written one by one."""
    generator = torch.Generator().manual_seed(0)
    targets = [Target("unet", str(i), "weight") for i in range(3)]
    weights = {target: torch.randn(shape, generator=generator).to(dtype).cuda() for target in targets}
    patches = {target: low_rank(64, i, stored, shape) for i, target in enumerate(targets)}
    stacks = {target: [(patch, 0.7)] for target, patch in patches.items()}
    made = recipes(stacks, weights.__getitem__, 2**28, {"cuda"})
    (batch,) = batches(made)
    got = [torch.empty_like(weight) for weight in weights.values()]
    batch.write(got, list(weights.values()))
    assert isinstance(batch, Group)
    for target, one in zip(targets, got, strict=True):
        patch = patches[target]
        exact = weights[target].double() + 0.7 * patch.scale * (patch.up.cuda().double() @ patch.down.cuda().double())
        assert (one != exact.to(dtype)).float().mean() < 5e-3
        assert ((one.double() - exact).abs() <= exact.abs() * 2 * torch.finfo(dtype).eps + 1e-5).all()


@pytest.mark.parametrize("stored", HALVES)
def test_loras_of_different_strengths_are_multiplied_in_pieces_and_as_exact(stored):
    """Their factors need float32; in pieces of 16 bits the sums are as good as those in float32."""
    shape, generator = (640, 1280), torch.Generator().manual_seed(0)
    targets = [Target("unet", str(i), "weight") for i in range(3)]
    weights = {target: torch.randn(shape, generator=generator).bfloat16().cuda() for target in targets}
    stack = [(low_rank(32, i, stored, shape), 0.3 + 0.1 * i) for i in range(5)]
    (batch,) = batches(recipes(dict.fromkeys(targets, stack), weights.__getitem__, 2**28, {"cuda"}))
    assert isinstance(batch, Group) and batch.up.dtype == stored and batch.up.shape[2] > batch.down.shape[1]
    got = [torch.empty_like(weight) for weight in weights.values()]
    batch.write(got, list(weights.values()))
    for target, one in zip(targets, got, strict=True):
        terms = (s * p.scale * (p.up.cuda().double() @ p.down.cuda().double()) for p, s in stack)
        exact = weights[target].double() + sum(terms)
        assert (one != exact.bfloat16()).float().mean() < 5e-3
        assert ((one.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-5).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_multiplied_on_the_tensor_cores_and_answered_in_float32(dtype):
    """This device and this torch have the operator; its sums are as good as those of float32 halves."""
    assert _answers_in_float32(torch.device("cuda", torch.cuda.current_device()), dtype)
    up, down = (torch.randn(shape, device="cuda").to(dtype) for shape in ((4, 640, 160), (4, 160, 1280)))
    fast, slow = (torch.randn(1, device="cuda").expand(4, 640, 1280).contiguous() for _ in range(2))
    slow.copy_(fast)
    exact = fast.double() + 0.3 * (up.double() @ down.double())
    add_products(fast, up, down, 0.3)
    add_products(slow, up.float(), down.float(), 0.3)
    size = 0.3 * (up.double().abs() @ down.double().abs())
    for got in (fast, slow):
        assert ((got.double() - exact).abs() <= 2**-18 * size).all()


def test_kernels_of_a_switch_grow_with_groups_and_not_with_modules(tmp_path):
    """Between known sets: the device starts about as many kernels for 60 modules as for 6."""
    counts = {}
    for modules in (6, 60):
        network = nn.ModuleList(nn.Linear(64, 64) for _ in range(modules)).requires_grad_(False).cuda().bfloat16()
        contents = {}
        for name in ("a", "b"):
            (path := tmp_path / name).write_bytes(b"x")
            patches = {Target("unet", str(i), "weight"): low_rank(4, i, shape=(64, 64)) for i in range(modules)}
            contents[path] = LoraContents(patches)
        # The budget holds the factors and not two sets of patched weights.
        budget = Budgets(prepared=2 * modules * (1024 + 4 * 128 * 2) + 1000)
        adapters = Adapters({"unet": network}, budget, lambda path, names, field, read=contents: read[path])
        sets = [adapters.resolve([LoraRef(str(path))]) for path in contents]
        for loras in sets:
            with adapters.active(loras):
                pass
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen, adapters.active(sets[0]):
            torch.cuda.synchronize()
        counts[modules] = sum(event.count for event in seen.key_averages() if "LaunchKernel" in event.key)
        adapters.restore()
    assert counts[6] > 0 and counts[60] <= counts[6] + 10


def test_a_group_that_overflows_is_refused_without_a_look_at_each_weight(network, library):
    """Every bit is the model's own afterwards."""
    before = snapshot(network)
    paths, _ = library
    huge = LowRank(torch.full((2, WIDTH), 1e30), torch.full((WIDTH, 2), 1e30), 1.0)
    patches = {Target("unet", str(i), "weight"): huge if i == 2 else low_rank(2, i) for i in range(LAYERS)}
    adapters = Adapters({"unet": network}, read=lambda path, names, field: LoraContents(patches))
    with pytest.raises(LoraError, match="not finite"), adapters.active(adapters.resolve([LoraRef(paths[0])])):
        raise AssertionError("not reached")
    assert identical(before, snapshot(network))


@pytest.mark.parametrize("own_on", [None, torch.device("cpu")])
def test_every_bit_comes_back_after_a_thousand_switches_and_no_memory_is_lost(network, library, own_on):
    """With own values beside the weights, and in main memory."""
    paths, read = library
    before = snapshot(network)
    adapters = Adapters({"unet": network}, Budgets(own_on=own_on, prepared=10**7), read)
    used = {}
    for switch in range(1, 1001):
        with adapters.active(adapters.resolve([LoraRef(paths[switch % 4], 0.3 + switch % 3)])):
            pass
        if switch in (100, 1000):
            used[switch] = torch.cuda.memory_allocated()
    adapters.restore()
    assert identical(before, snapshot(network))
    assert abs(used[1000] - used[100]) <= 10**7


def test_a_switch_between_cached_sets_copies_nothing_from_the_host(network, library):
    """Factors, or the patched weights themselves, are on the device from the second time on."""
    paths, read = library
    adapters = Adapters({"unet": network}, read=read)
    sets = [adapters.resolve([LoraRef(path)]) for path in paths[:2]]

    def switch(loras):
        with adapters.active(loras):
            torch.cuda.synchronize()

    def copies(loras):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            switch(loras)
        return sum(event.count for event in seen.key_averages() if "HtoD" in event.key)

    assert copies(sets[0]) > 0  # the first time there are
    switch(sets[1])
    assert copies(sets[0]) == 0
    assert copies(sets[1]) == 0


def test_a_network_that_goes_home_takes_its_loras_along(network, library):
    """Moved to the CPU and back with a set on: switches go on, and every bit comes back."""
    paths, read = library
    before = snapshot(network)
    adapters = Adapters({"unet": network}, read=read)
    for device in ("cpu", "cuda", "cpu", "cuda"):
        with adapters.active(adapters.resolve([LoraRef(paths[0])])):
            network.to(device)
        with adapters.active(adapters.resolve([LoraRef(paths[1])])):
            pass
    adapters.restore()
    assert identical(before, snapshot(network))
