"""LoRAs on and off: exactly the stated sums, in any stack, on any kind of weight, and every bit back."""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import nn

from impasto.engine.engine import Engine
from impasto.errors import LoraError
from impasto.lora.apply import Adapters
from impasto.lora.budgets import GIB, Budgets
from impasto.lora.contents import LoraContents
from impasto.lora.keys import Target
from impasto.lora.merge import InOrder, Product, recipe
from impasto.lora.patch import LowRank, Patch
from impasto.models.fused import fuse_projections
from impasto.types import LoraRef

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of a number, relative, at most
FLOAT32_SUM = 1e-5  # what sums in float32 may differ by, relative to the sum of the terms' sizes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Small(nn.Module):
    """One of each kind of module that LoRAs change."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.to_q = nn.Linear(12, 10)
        self.to_k = nn.Linear(12, 10, bias=False)
        self.conv_in = nn.Conv2d(4, 6, 3)
        self.skip = nn.Conv2d(4, 6, 1)
        self.norm = nn.LayerNorm(10)
        self.groups = nn.GroupNorm(2, 6)
        generator = seeded(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)


def low_rank(shape, rank=2, seed=0, dtype=torch.float32, scale=1.0) -> LowRank:
    """A random patch for a weight of this shape."""
    generator = seeded(seed)
    down = torch.randn(rank, *shape[1:], generator=generator).to(dtype)
    return LowRank(down, torch.randn(shape[0], rank, generator=generator).to(dtype), scale)


@dataclass(frozen=True, slots=True, eq=False)
class Added(Patch):
    """Adds a tensor: not low-rank, for any parameter."""

    kind: ClassVar[str] = "diff"
    additive: ClassVar[bool] = True
    rank = None
    diff: torch.Tensor

    @property
    def shape(self):
        return tuple(self.diff.shape)

    def fits(self, shape):
        return self.diff.shape == shape

    def patched(self, weight, strength):
        return weight.float() + strength * self.diff.float()


@dataclass(frozen=True, slots=True, eq=False)
class Squared(Patch):
    """Depends on the weight as it stands, so that order shows."""

    kind: ClassVar[str] = "square"
    additive: ClassVar[bool] = False
    rank = None
    factor: torch.Tensor

    @property
    def shape(self):
        return ()

    def fits(self, shape):
        return True

    def patched(self, weight, strength):
        return weight.float() + strength * self.factor * weight.float() ** 2


@dataclass(frozen=True, slots=True, eq=False)
class Failing(Patch):
    """Runs out of memory while it is applied."""

    kind: ClassVar[str] = "failing"
    additive: ClassVar[bool] = False
    rank = None
    error: type[BaseException] = MemoryError

    @property
    def shape(self):
        return ()

    def fits(self, shape):
        return True

    def patched(self, weight, strength):
        raise self.error


class Library:
    """LoRA files whose patches the test makes itself: the file is real, what is read from it is given."""

    def __init__(self, folder):
        self.folder = folder
        self.reads = []
        self._contents = {}

    def add(self, name, patches, metadata=None) -> str:
        path = self.folder / f"{name}.safetensors"
        path.write_bytes(b"x")
        self._contents[path.resolve()] = LoraContents(
            {t if isinstance(t, Target) else unet(t): p for t, p in patches.items()}, metadata=metadata or {}
        )
        return str(path)

    def read(self, path, names, field):
        self.reads.append(path.name)
        return self._contents[path]


def unet(name: str) -> Target:
    module, _, parameter = name.rpartition(".")
    return Target("unet", module, parameter)


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path)


def wearing(adapters, *loras, on=()):
    """Run with these LoRAs on, each a path or ``(path, scale)``."""
    refs = [LoraRef(lora) if isinstance(lora, str) else LoraRef(*lora) for lora in loras]
    return adapters.active(adapters.resolve(refs), *on)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def identical(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def close(got, weight, terms):
    """Whether ``got`` is the exact sum of the terms but for one rounding and what float32 sums may differ by."""
    exact = weight.double() + sum(terms)
    size = weight.double().abs() + sum(term.abs() for term in terms)
    return bool(((got.double() - exact).abs() <= ULP[got.dtype] * exact.abs() + FLOAT32_SUM * size).all())


def product(patch, shape, strength=1.0):
    """``strength * scale * up @ down`` in float64, and the sizes of its terms."""
    up, down = patch.up.double().flatten(1), patch.down.double().flatten(1)
    return (strength * patch.scale * (up @ down)).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("layer", ["to_q.weight", "conv_in.weight", "skip.weight"])
def test_a_weight_is_the_float32_sum_rounded_once(library, dtype, stored, layer):
    """Whatever the formats of model and file: within one unit in the last place of the exact sum."""
    network = Small(dtype)
    before = network.get_parameter(layer).detach().clone()
    patch = low_rank(before.shape, 3, dtype=stored, scale=0.37)
    path = library.add("a", {layer: patch})
    with wearing(Adapters({"unet": network}, read=library.read), (path, 0.8)):
        got = network.get_parameter(layer)
        assert close(got, before, [product(patch, before.shape, 0.8)])
        assert not torch.equal(got, before)


@pytest.mark.parametrize("shape", [(640, 640), (1280, 2048), (300, 2560)])
@pytest.mark.parametrize(("stored", "fused"), [(torch.bfloat16, True), (torch.float16, False)])
def test_both_ways_of_adding_round_like_float32_at_real_widths(shape, stored, fused):
    """bfloat16 factors go through one product, others through float32 blocks; the bits are float32's, rounded once.

    Equal to the reference in all but the few places that lie next to the middle of two numbers.
    """
    weight = torch.randn(shape, generator=seeded(0)).bfloat16()
    patch = low_rank(shape, 32, dtype=stored, scale=0.25)
    made = recipe([(patch, 0.7)], weight)
    assert isinstance(made, Product) and made.fused == fused
    assert made.up.dtype == made.down.dtype == stored  # no larger than the file
    got = torch.empty_like(weight)
    made.write(got, weight)
    reference = (weight.double() + product(patch, shape, 0.7)).bfloat16()
    assert (got != reference).float().mean() < 2e-4
    assert close(got, weight, [product(patch, shape, 0.7)])
    rounded_twice = weight + product(patch, shape, 0.7).bfloat16()
    assert (rounded_twice != reference).float().mean() > 0.02  # what this is not


def test_a_lone_files_tensors_are_used_as_they_are():
    """Neither copied nor changed, whatever its scale: getting a set ready costs next to nothing."""
    weight = torch.randn(64, 32, generator=seeded(0)).bfloat16()
    for stored in DTYPES:
        patch = low_rank(weight.shape, 4, dtype=stored, scale=0.37)
        made = recipe([(patch, 0.7)], weight)
        assert (made.up.data_ptr(), made.down.data_ptr()) == (patch.up.data_ptr(), patch.down.data_ptr())
        assert made.fused == (stored == torch.bfloat16)


def test_a_file_saved_in_more_digits_than_it_has_is_multiplied_as_bfloat16():
    """Trained in bfloat16, saved in another format; one number more and it is not."""
    weight = torch.randn(64, 32, generator=seeded(0)).bfloat16()
    for stored in (torch.float16, torch.float32):
        patch = low_rank(weight.shape, 4, dtype=torch.bfloat16, scale=0.37)
        patch = LowRank(patch.down.to(stored), patch.up.to(stored), patch.scale)
        assert recipe([(patch, 0.7)], weight).fused
        patch.down[-1, -1] = 1 + 2**-10
        made, got = recipe([(patch, 0.7)], weight), torch.empty_like(weight)
        made.write(got, weight)
        assert not made.fused
        assert close(got, weight, [product(patch, weight.shape, 0.7)])


def test_where_weight_and_delta_nearly_cancel_the_terms_size_counts():
    """The stated exception to one unit in the last place: what is left is off by float32's share of the terms."""
    weight = torch.randn(256, 256, generator=seeded(0)).bfloat16()
    patch = low_rank(weight.shape, 256, seed=1)
    up = torch.linalg.solve(patch.down.double().T, -weight.double().T * (1 + 1e-6)).T
    patch = LowRank(patch.down, up.float(), 1.0)
    got = torch.empty_like(weight)
    recipe([(patch, 1.0)], weight).write(got, weight)
    exact = weight.double() + product(patch, weight.shape)
    assert exact.abs().max() < 0.01 * weight.double().abs().max()  # they do cancel
    assert ((got.double() - exact).abs() > 2 * ULP[torch.bfloat16] * exact.abs()).any()  # so one unit is not kept
    terms = weight.double().abs() + patch.up.double().abs() @ patch.down.double().abs()
    assert ((got.double() - exact).abs() <= ULP[torch.bfloat16] * exact.abs() + 2**-20 * terms).all()


def test_the_fused_way_rounds_once_without_the_cpus_bfloat16_instructions_too():
    """torch's own product, which other processors use, is as exact as oneDNN's."""
    weight = torch.randn(256, 320, generator=seeded(0)).bfloat16()
    patch = low_rank(weight.shape, 48, dtype=torch.bfloat16, scale=0.5)
    made, got = recipe([(patch, 0.7)], weight), torch.empty_like(weight)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        made.write(got, weight)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert made.fused
    assert (got != (weight.double() + product(patch, weight.shape, 0.7)).bfloat16()).float().mean() < 2e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 5, 9])
def test_additive_stacks_are_summed_in_one_product(dtype, count):
    """Any number of LoRAs, of different ranks and strengths, become one pass."""
    weight = torch.randn(24, 16, generator=seeded(0)).to(dtype)
    stack = [(low_rank(weight.shape, 1 + i, i, dtype, scale=1 / (1 + i)), (-1) ** i * (0.3 + i)) for i in range(count)]
    made = recipe(stack, weight)
    assert isinstance(made, Product) and made.up.shape[1] == sum(range(1, count + 1))
    got = torch.empty_like(weight)
    made.write(got, weight)
    assert close(got, weight, [product(patch, weight.shape, strength) for patch, strength in stack])


@pytest.mark.parametrize("strengths", [(1e-44, 1.0), (1.0, 1e-44), (3e38, 1.0), (-1e-30, 1e-30)])
def test_strengths_far_apart_do_no_harm(strengths):
    """Their ratio overflows nowhere."""
    weight = torch.randn(8, 8, generator=seeded(0))
    patches = [low_rank(weight.shape, seed=i, scale=1e-3 if max(strengths) > 1e30 else 1.0) for i in range(2)]
    made = recipe(list(zip(patches, strengths, strict=True)), weight)
    assert torch.isfinite(made.up).all() and torch.isfinite(made.down).all()


@pytest.mark.parametrize(("scale", "strength"), [(1e39, 1.0), (1e30, 1e-30), (1e-39, 1.0), (0.0, 1.0), (1e-30, 4.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_size_give_their_product_or_are_refused(dtype, scale, strength):
    """An alpha beyond all reason overflows, and is seen; one next to nothing does next to nothing."""
    weight = torch.randn(8, 6, generator=seeded(0)).to(dtype)
    patch = low_rank(weight.shape, 2, scale=scale)
    made, got = recipe([(patch, strength)], weight), torch.empty_like(weight)
    made.write(got, weight)
    if scale > 1e38:
        assert made.risky and not torch.isfinite(got).all()
    else:
        assert close(got, weight, [product(patch, weight.shape, strength)])


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e15, 0.0])
def test_factors_of_any_size_give_their_product(size):
    """Tiny ones beside huge ones, as some trainers leave them, and a file of zeros."""
    weight = torch.zeros(8, 6)
    down = torch.randn(2, 6, generator=seeded(1))
    patch = LowRank(down / size if size > 1e-38 else down, torch.full((8, 2), size), 1.0)
    got = torch.empty_like(weight)
    recipe([(patch, 0.5)], weight).write(got, weight)
    exact = product(patch, weight.shape, 0.5)
    assert ((got.double() - exact).abs() <= 1e-6 * exact.abs().max() + 1e-44).all()


def test_a_stack_means_the_files_merged_one_after_another():
    """In the request's order, each on the weight as the earlier ones left it, in float32."""
    weight = torch.randn(6, 5, generator=seeded(0))
    patches = {
        "low": low_rank(weight.shape, seed=1),
        "also low": low_rank(weight.shape, seed=2),
        "added": Added(torch.randn(6, 5, generator=seeded(3))),
        "squared": Squared(torch.tensor(0.3)),
    }
    seen = set()
    for order in itertools.permutations(patches):
        stack = [(patches[name], 0.5 + i) for i, name in enumerate(sorted(order))]
        stack = [stack[sorted(order).index(name)] for name in order]
        expected = weight
        for patch, strength in stack:
            expected = patch.patched(expected, strength)
        got = torch.empty_like(weight)
        made = recipe(stack, weight)
        made.write(got, weight)
        assert isinstance(made, InOrder)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        seen.add(round(got.sum().item(), 2))
    assert len(seen) > 1  # order does matter where something multiplies


def test_biases_and_norms_are_weights_too(library):
    """Everything with a name can be a target."""
    network = Small(torch.bfloat16)
    before = snapshot(network)
    names = ["to_q.bias", "norm.weight", "norm.bias", "groups.weight", "groups.bias", "conv_in.bias"]
    path = library.add("a", {name: Added(torch.full(before[name].shape, 0.5)) for name in names})
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, (path, 2)):
        for name in names:
            assert torch.equal(network.get_parameter(name), (before[name].float() + 1).bfloat16())
    adapters.restore()
    assert identical(before, snapshot(network))


def test_text_encoders_have_a_strength_of_their_own(library):
    """``scale`` is for the UNets; ``text_scale``, where given, for the text encoders."""
    networks = {name: Small() for name in ("unet", "refiner", "text_encoder", "text_encoder_2")}
    befores = {name: network.to_q.weight.clone() for name, network in networks.items()}
    patches = {Target(name, "to_q", "weight"): Added(torch.ones(10, 12)) for name in networks}
    adapters = Adapters(networks, read=library.read)

    @dataclass(frozen=True)
    class Ref:
        path: str
        scale: float
        text_scale: float | None = None

    path = library.add("a", patches)
    for ref, unets, texts in [(Ref(path, 0.5), 0.5, 0.5), (Ref(path, 0.5, 2.0), 0.5, 2.0), (Ref(path, 1.0, 0.0), 1, 0)]:
        with adapters.active(adapters.resolve([ref])):
            for name, network in networks.items():
                added = texts if name.startswith("text") else unets
                torch.testing.assert_close(network.to_q.weight, befores[name] + added)


def test_a_set_without_patches_for_a_network_leaves_it_alone(library):
    """The refiner's calls can be shared by rows whose sets differ only elsewhere; the weights' versions prove it."""
    networks = {"unet": Small(), "refiner": Small()}
    adapters = Adapters(networks, read=library.read)
    base = library.add("base", {"to_q.weight": low_rank((10, 12))})
    both = library.add("both", {Target(name, "to_q", "weight"): low_rank((10, 12)) for name in networks})
    one, two = adapters.resolve([LoraRef(base)]), adapters.resolve([LoraRef(base, 0.5), LoraRef(both)])

    assert adapters.touching(one, "refiner") == ()
    assert adapters.touching(one, "unet") == one
    assert adapters.touching(two, "refiner") == two[1:]
    untouched = networks["refiner"].to_q.weight._version
    with adapters.active(one):
        assert networks["refiner"].to_q.weight._version == untouched
    with adapters.active(two):
        assert networks["refiner"].to_q.weight._version == untouched + 1


def test_networks_are_switched_apart(library):
    """What is put on for the text encoders leaves on the UNet what it has."""
    networks = {"unet": Small(), "text_encoder": Small()}
    adapters = Adapters(networks, read=library.read)
    sets = [
        library.add(str(i), {Target(name, "to_q", "weight"): low_rank((10, 12), seed=i) for name in networks})
        for i in range(2)
    ]
    with wearing(adapters, sets[0]):
        version, text = networks["unet"].to_q.weight._version, networks["text_encoder"].to_q.weight.clone()
    with wearing(adapters, sets[1], on=("text_encoder",)):
        assert networks["unet"].to_q.weight._version == version
        assert not torch.equal(networks["text_encoder"].to_q.weight, text)


def test_a_set_that_is_on_costs_nothing(library):
    """The same set again, under other positions or with another strength for networks it has nothing for."""
    network = Small()
    path, nothing = (
        library.add("a", {"to_q.weight": low_rank((10, 12))}),
        library.add("b", {"to_q.bias": Added(torch.ones(10))}),
    )
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, path):
        version, switch = network.to_q.weight._version, adapters.last_switch
    for same in ([path], [(nothing, 0.0), path]):
        with wearing(adapters, *same):
            assert network.to_q.weight._version == version and adapters.last_switch is switch


def test_a_switch_writes_each_weight_at_most_once_and_only_where_sets_differ(library):
    """From A to B: B's weights straight from the model's own, A's others put back, what both have alike untouched."""
    network = Small()
    q = library.add("q", {"to_q.weight": low_rank((10, 12))})
    k = library.add("k", {"to_k.weight": low_rank((10, 12))})
    adapters = Adapters({"unet": network}, read=library.read)

    start = network.to_q.weight._version, network.to_k.weight._version

    def versions():
        return network.to_q.weight._version - start[0], network.to_k.weight._version - start[1]

    with wearing(adapters, q):
        assert versions() == (1, 0)
    with wearing(adapters, q, k):
        assert versions() == (1, 1)
    with wearing(adapters, (q, 0.5), k):
        assert versions() == (2, 1)
    with wearing(adapters, k):
        assert versions() == (3, 1) and adapters.last_switch.weights == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("grad", [True, False])
def test_it_works_in_every_mode_of_autograd(library, mode, grad):
    """Under inference mode, without gradients, and with; on weights that want gradients and on others."""
    network = Small(torch.bfloat16).requires_grad_(grad)
    before = snapshot(network)
    path = library.add("a", {"to_q.weight": low_rank((10, 12)), "conv_in.weight": Squared(torch.tensor(0.1))})
    adapters = Adapters({"unet": network}, read=library.read)
    with mode(), wearing(adapters, path):
        changed = snapshot(network)
    with wearing(adapters, (path, 0.5)):
        pass
    with mode():
        adapters.restore()
    assert identical(before, snapshot(network)) and not identical(before, changed)


def test_weights_made_in_inference_mode_can_be_patched_too(library):
    """A network that was loaded under inference mode, used outside it."""
    with torch.inference_mode():
        network = Small()
        before = snapshot(network)
    path = library.add("a", {"to_q.weight": low_rank((10, 12))})
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, path):
        assert not identical(before, snapshot(network))
    adapters.restore()
    assert identical(before, snapshot(network))


def test_the_parameters_stay_the_same_objects_in_the_same_memory(library):
    """So nothing that recorded or compiled the network has to look again."""
    network = Small(torch.bfloat16)
    where = {name: (id(parameter), parameter.data_ptr()) for name, parameter in network.named_parameters()}
    path = library.add("a", {"to_q.weight": low_rank((10, 12)), "norm.bias": Added(torch.ones(10))})
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, path), wearing(adapters, (path, 2)), wearing(adapters):
        pass
    assert where == {name: (id(parameter), parameter.data_ptr()) for name, parameter in network.named_parameters()}


def test_a_compiled_network_is_not_compiled_again(library):
    """In-place changes are seen by compiled code without another compilation."""
    network = Small()
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: network.to_q(x), backend=backend)
    paths = [library.add(str(i), {"to_q.weight": low_rank((10, 12), seed=i)}) for i in range(3)]
    adapters = Adapters({"unet": network}, read=library.read)
    x = torch.randn(2, 12, generator=seeded(5))
    with torch.inference_mode():
        compiled(x)
        for path in paths:
            with wearing(adapters, path):
                torch.testing.assert_close(compiled(x), network.to_q(x))
    torch._dynamo.reset()
    assert len(compiles) == 1


def test_fused_projections_follow(library):
    """Weights that are views of one matrix are patched in place, and the fused call sees it."""
    attention = Attention(16, heads=2, dim_head=8).eval()
    network = nn.ModuleDict({"attn1": attention})
    fuse_projections(network)
    before = attention.fused_weight.clone()
    path = library.add("a", {"attn1.to_k.weight": low_rank((16, 16)), "attn1.to_v.weight": Added(torch.ones(16, 16))})
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, path):
        assert torch.equal(attention.fused_weight[:16], before[:16])
        assert torch.equal(attention.fused_weight[16:32], attention.to_k.weight)
        assert torch.equal(attention.fused_weight[32:], before[32:] + 1)
    adapters.restore()
    assert torch.equal(attention.fused_weight, before)


def test_channels_last_convolutions_are_patched_where_they_lie(library):
    """Strides are kept and the sum is the same."""
    network = Small(torch.bfloat16).to(memory_format=torch.channels_last)
    before = network.conv_in.weight.detach().clone()
    patch = low_rank(before.shape, dtype=torch.bfloat16)
    path = library.add("a", {"conv_in.weight": patch})
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, path):
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert close(network.conv_in.weight, before, [product(patch, before.shape)])
    adapters.restore()
    assert torch.equal(network.conv_in.weight, before)


@pytest.mark.parametrize("tie", ["parameter", "module", "memory"])
def test_a_shared_weight_is_one_weight_under_two_names(library, tie):
    """Patches for both names are summed on it, and it comes back bit for bit, from either name."""
    network = Small(torch.bfloat16)
    if tie == "parameter":
        network.to_k.weight = network.to_q.weight
    elif tie == "module":
        network.to_k = network.to_q
    else:
        network.to_k.weight.data = network.to_q.weight.data
    before = snapshot(network)
    q = library.add("q", {"to_q.weight": Added(torch.ones(10, 12))})
    k = library.add("k", {"to_k.weight": Added(torch.ones(10, 12))})
    adapters = Adapters({"unet": network}, read=library.read)
    for loras, added in (([q], 1), ([q, k], 2), ([k], 1), ([k, q], 2), ([], 0), ([k], 1)):
        with wearing(adapters, *loras):
            assert torch.equal(network.to_q.weight, (before["to_q.weight"].float() + added).bfloat16())
            assert torch.equal(network.to_k.weight, network.to_q.weight)
    adapters.restore()
    assert identical(before, snapshot(network))


def test_a_network_moved_between_switches_is_patched_where_it_is(library):
    """Moving gives every weight another memory; own values and factors follow."""
    network = Small()
    before = snapshot(network)
    path = library.add("a", {"to_q.weight": low_rank((10, 12)), "conv_in.weight": Squared(torch.tensor(0.1))})
    adapters = Adapters({"unet": network}, read=library.read)
    for _ in range(4):
        with wearing(adapters, path):
            for parameter in network.parameters():
                parameter.data = parameter.data.clone()
        adapters.restore()
        assert identical(before, snapshot(network))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("before_it", ["nothing", "another set"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(library, error, before_it):
    """Out of memory after the first weights, or the user's interrupt: every bit is the model's own, and it goes on."""
    network = Small(torch.bfloat16)
    before = snapshot(network)
    good = library.add("good", {name: low_rank(before[name].shape, seed=3) for name in ("to_q.weight", "to_k.weight")})
    patches = {
        "to_q.weight": low_rank((10, 12)),
        "to_k.weight": Failing(error),
        "conv_in.weight": low_rank((6, 4, 3, 3)),
    }
    bad = library.add("bad", patches)
    adapters = Adapters({"unet": network}, read=library.read)
    if before_it == "another set":
        with wearing(adapters, good):
            pass
    with pytest.raises(error), wearing(adapters, bad):
        raise AssertionError("not reached")
    assert identical(before, snapshot(network))
    with wearing(adapters, good):
        assert not identical(before, snapshot(network))
    with wearing(adapters):
        assert identical(before, snapshot(network))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_overflow_are_refused(library, dtype):
    """Every number of the file is finite, the weight would not be: the weights stay the model's own."""
    network = Small(dtype)
    before = snapshot(network)
    huge = LowRank(torch.full((2, 12), 1e30), torch.full((10, 2), 1e30), 1.0)
    path = library.add("huge", {"to_k.weight": low_rank((10, 12)), "to_q.weight": huge})
    adapters = Adapters({"unet": network}, read=library.read)
    with pytest.raises(LoraError, match="not finite; lower its scale") as caught, wearing(adapters, path):
        raise AssertionError("not reached")
    assert caught.value.field == "loras.0.path"
    assert identical(before, snapshot(network))


def test_half_precision_overflow_is_refused_and_large_weights_are_not(library):
    """65504 is the largest float16; what fits is applied."""
    network = Small(torch.float16)
    patches = {scale: LowRank(torch.full((1, 12), 100.0), torch.full((10, 1), 100.0), scale) for scale in (6.0, 7.0)}
    paths = {scale: library.add(str(scale), {"to_k.weight": patch}) for scale, patch in patches.items()}
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, paths[6.0]):
        assert network.to_k.weight.float().min() > 59000
    with pytest.raises(LoraError, match="not finite"), wearing(adapters, paths[7.0]):
        raise AssertionError("not reached")


def test_a_resolved_set_reports_every_file_in_order(library):
    """Also those of strength 0, which change nothing."""
    network = Small()
    before = snapshot(network)
    contents = {"to_q.weight": low_rank((10, 12))}
    paths = [library.add(name, contents) for name in "ab"]
    adapters = Adapters({"unet": network}, read=library.read)
    loras = adapters.resolve([LoraRef(paths[0], 0.0), LoraRef(paths[1], 1.0)])
    assert [report.patches.keys() == {unet("to_q.weight")} for report in adapters.report(loras)] == [True, True]
    assert adapters.touching(loras, "unet") == loras[1:]
    with adapters.active(loras[:1]):
        assert identical(before, snapshot(network))


def test_files_are_read_when_they_are_resolved_and_once(library):
    """A switch between sets that were used lately reads nothing."""
    network = Small()
    paths = [library.add(str(i), {"to_q.weight": low_rank((10, 12), seed=i)}) for i in range(3)]
    adapters = Adapters({"unet": network}, read=library.read)
    sets = [adapters.resolve([LoraRef(path)]) for path in paths]
    assert len(library.reads) == 3
    for loras in sets * 3:
        with adapters.active(loras):
            pass
    assert len(library.reads) == 3


def test_a_set_in_the_prepared_cache_needs_no_file(library):
    """Not even when its patches were dropped from memory and its file is gone."""
    network = Small()
    before = network.to_q.weight.detach().clone()
    patch = low_rank((10, 12))
    paths = [library.add("0", {"to_q.weight": patch}), library.add("1", {"to_q.weight": low_rank((10, 12), seed=1)})]
    adapters = Adapters({"unet": network}, Budgets(parsed=0), read=library.read)
    sets = [adapters.resolve([LoraRef(path)]) for path in paths]
    for loras in sets:
        with adapters.active(loras):
            pass
    for path in library.folder.iterdir():
        path.unlink()
    for _ in range(3):
        with adapters.active(sets[0]):
            assert close(network.to_q.weight, before, [product(patch, before.shape)])
        with adapters.active(sets[1]):
            pass


def test_a_file_that_changed_while_its_request_waited_is_refused(library):
    """Its patches are no longer in memory: nobody gets another LoRA than the one that was reported."""
    network = Small()
    before = snapshot(network)
    path = library.add("a", {"to_q.weight": low_rank((10, 12))})
    adapters = Adapters({"unet": network}, Budgets(parsed=0, prepared=0), read=library.read)
    loras = adapters.resolve([LoraRef(path)])
    (library.folder / "a.safetensors").write_bytes(b"another")
    with pytest.raises(LoraError, match="changed while the request waited"), adapters.active(loras):
        raise AssertionError("not reached")
    assert identical(before, snapshot(network))


@pytest.mark.parametrize("budgets", [Budgets(), Budgets(0, 0, 0), Budgets(10**4, 6000, 10**3), Budgets(prepared=10**9)])
def test_budgets_bound_what_is_kept_and_change_no_bit(library, budgets):
    """Whatever is kept or dropped, the weights of a set are the same bits every time."""
    network = Small(torch.bfloat16)
    before = snapshot(network)
    names = ["to_q.weight", "conv_in.weight"]
    paths = [
        library.add(str(i), {name: low_rank(before[name].shape, 4, i, torch.float16) for name in names})
        for i in range(6)
    ]
    adapters = Adapters({"unet": network}, budgets, read=library.read)
    first = {}
    rng = np.random.default_rng(0)
    for _ in range(100):
        picked = tuple(int(i) for i in rng.permutation(6)[: rng.integers(0, 3)])
        with wearing(adapters, *(paths[i] for i in picked)):
            assert identical(first.setdefault(picked, snapshot(network)), snapshot(network))
        held = adapters.held_bytes
        assert held["parsed"] <= budgets.parsed and held["prepared"] <= budgets.prepared
    adapters.restore()
    assert identical(before, snapshot(network))
    if budgets.own is not None:
        with wearing(adapters):
            assert adapters.held_bytes["own"] <= budgets.own + sum(before[name].nbytes for name in names)
    adapters.clear()
    assert set(adapters.held_bytes.values()) == {0}


def test_files_with_little_but_words_are_bounded_too(library):
    """A header of megabytes about one tiny tensor costs what it takes, and so does the least of tensors."""
    adapters = Adapters({"unet": Small()}, Budgets(parsed=10**6), read=library.read)
    patch = low_rank((10, 12))
    for index in range(20):
        path = library.add(str(index), {"to_q.weight": patch}, metadata={"notes": "x" * 10**5})
        adapters.resolve([LoraRef(path)])
    assert adapters.held_bytes["parsed"] == 9 * (10**5 + len("notes") + 1024 + patch.up.nbytes + patch.down.nbytes)


@pytest.mark.parametrize(
    ("free", "given", "expected"),
    [((32 * GIB, 80 * GIB), (None, None), (4 * GIB, 10 * GIB)), ((8 * GIB, 4 * GIB), (None, None), (GIB, GIB // 2)),
     ((2**50, 2**50), (None, None), (4 * GIB, 16 * GIB)), ((None, None), (None, None), (GIB, GIB)),
     ((32 * GIB, 80 * GIB), (0, 5), (0, 5)), ((None, 8 * GIB), (7, None), (7, GIB))],
)  # fmt: skip
def test_budgets_are_an_eighth_of_what_is_free_unless_the_operator_says_otherwise(free, given, expected):
    """Of main memory for files, of the device for what is ready; bounded, and something where nothing is known."""
    budgets = Budgets.within(*free, *given)
    assert (budgets.parsed, budgets.prepared, budgets.own) == (*expected, None)


def test_an_engine_gives_its_loras_what_the_settings_say(tmp_path):
    """Zero keeps nothing; unset, there is something."""
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    for bytes_kept in (0, None):
        engine = Engine.load("builtin", device="cpu", lora_memory_bytes=bytes_kept, lora_switch_bytes=bytes_kept)
        width = engine._model.base.unet.get_submodule(name).in_features
        patch = low_rank((width, width))
        save_file({f"unet.{name}.lora_A.weight": patch.down, f"unet.{name}.lora_B.weight": patch.up}, tmp_path / "a")
        adapters = engine._adapters
        with adapters.active(adapters.resolve([LoraRef(str(tmp_path / "a"))])):
            pass
        kept = [adapters.held_bytes[name] > 0 for name in ("parsed", "prepared")]
        assert kept == [bytes_kept is None] * 2


def test_own_values_are_kept_only_of_what_was_ever_patched(library):
    """No copy of the model is made for a LoRA that touches one weight of it."""
    network = Small()
    path = library.add("a", {"to_q.weight": low_rank((10, 12))})
    adapters = Adapters({"unet": network}, read=library.read)
    assert adapters.held_bytes["own"] == 0
    with wearing(adapters, path):
        assert adapters.held_bytes["own"] == network.to_q.weight.nbytes


def test_kohya_and_peft_files_are_applied_as_written(tmp_path):
    """From real files through the real reader: the closed formula, with alpha over rank and the request's strength."""
    network = Small()
    before = network.to_q.weight.detach().clone()
    patch = low_rank((10, 12), 4)
    kohya = {"lora_unet_to_q.lora_down.weight": patch.down, "lora_unet_to_q.lora_up.weight": patch.up}
    save_file(kohya | {"lora_unet_to_q.alpha": torch.tensor(1.0)}, tmp_path / "k.safetensors")
    save_file({"unet.to_q.lora_A.weight": patch.down, "unet.to_q.lora_B.weight": patch.up}, tmp_path / "p.safetensors")
    adapters = Adapters({"unet": network})
    with wearing(adapters, (str(tmp_path / "k.safetensors"), 0.5), (str(tmp_path / "p.safetensors"), 2.0)):
        terms = [product(patch, before.shape, 0.5 / 4), product(patch, before.shape, 2.0)]
        assert close(network.to_q.weight, before, terms)


def test_a_replaced_file_is_another_lora(library):
    """The next request uses the new file, not what was read before."""
    network = Small()
    before = network.to_q.weight.detach().clone()
    path = library.add("a", {"to_q.weight": Added(torch.ones(10, 12))})
    adapters = Adapters({"unet": network}, read=library.read)
    with wearing(adapters, path):
        pass
    library.add("a", {"to_q.weight": Added(torch.full((10, 12), 3.0))})
    with wearing(adapters, path):
        assert torch.equal(network.to_q.weight, before + 3)


@pytest.mark.parametrize("name", ["missing.safetensors", "", "a\0b", "x" * 5000])
def test_a_name_that_is_no_file_is_refused(name):
    """The error names the field and does not repeat folders."""
    with pytest.raises(LoraError, match=r"loras\.0\.path was not found"):
        Adapters({"unet": Small()}).resolve([LoraRef(name)])
