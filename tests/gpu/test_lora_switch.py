"""LoRA switches on CUDA: the same bits, no copies from the host between cached sets, own values kept at home."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.lora.contents import LoraContents
from impasto.lora.keys import Target
from impasto.lora.merge import recipe
from impasto.lora.patch import LowRank
from impasto.types import LoraRef

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
