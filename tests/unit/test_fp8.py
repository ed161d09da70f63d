"""Linear layers in float8: near the plain ones, low-rank LoRAs in full beside, and exactly themselves afterwards."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from impasto.engine.accel import Accel, accelerate
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.lora.contents import LoraContents
from impasto.lora.keys import Target
from impasto.lora.patch import LowRank, Patch
from impasto.lora.patches.decomposed import Decomposed
from impasto.lora.patches.full import Difference
from impasto.models import fp8
from impasto.models.fp8 import FORMAT, Fp8Linear, can_multiply, listen, to_float8, to_fp8
from impasto.models.fused import FusedAttention
from impasto.types import LoraRef
from tests.random_sdxl import base_unet

CPU = torch.device("cpu")
OUT, IN = 96, 64
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not can_multiply(CPU, torch.bfloat16), reason="this torch cannot multiply float8 on a CPU"),
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Feed(nn.Module):
    """Two layers under names that are large, one that is not."""

    def __init__(self, out=OUT, inside=IN):
        super().__init__()
        self.ff = nn.ModuleDict({"net": nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(inside, out)})})})
        self.ff["net"]["2"] = nn.Linear(out, inside)
        self.other = nn.Linear(inside, inside)
        for index, parameter in enumerate(self.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=seeded(index)) / inside**0.5
        self.to(torch.bfloat16).requires_grad_(False)

    @property
    def first(self) -> nn.Linear:
        return self.ff["net"]["0"]["proj"]


@pytest.fixture
def feed() -> Feed:
    made = Feed()
    assert len(to_fp8(made)) == 2
    return made


def rows(count=50, inside=IN, seed=9) -> torch.Tensor:
    return torch.randn(count, inside, generator=seeded(seed)).bfloat16()


def low_rank(seed=0, rank=4, size=0.02, dtype=torch.bfloat16) -> LowRank:
    down = torch.randn(rank, IN, generator=seeded(seed)) / IN**0.5
    return LowRank(down.to(dtype), (torch.randn(OUT, rank, generator=seeded(seed + 1)) * size).to(dtype), 0.5)


class Shelf:
    """LoRA files for the first layer, and the adapters that read them."""

    def __init__(self, folder, network, budgets=None):
        self._folder, self._contents = folder, {}
        self.adapters = Adapters({"unet": network}, budgets, lambda path, names, field: self._contents[path.name])

    def add(self, name: str, patch: Patch) -> LoraRef:
        (self._folder / name).write_bytes(b"x")
        self._contents[name] = LoraContents({Target("unet", "ff.net.0.proj", "weight"): patch})
        return LoraRef(str(self._folder / name))

    def wearing(self, *refs: LoraRef):
        return self.adapters.active(self.adapters.resolve(refs))


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_a_product_is_near_the_plain_one_and_that_of_the_rounded_numbers(size):
    """3 % of the norm off at rows of any size; next to nothing off the product of what was rounded."""
    layer, inputs = Feed(512, 256).first, rows(77, 256) * size
    inputs[3] = 0
    plain = layer(inputs)
    weight, bias = layer.weight.double(), layer.bias.double()
    values, scales = to_float8(inputs)
    rounded, weight_scales = to_float8(layer.weight)
    exact = (values.double() * scales) @ (rounded.double() * weight_scales).T + bias
    network = Feed(512, 256)
    to_fp8(network)
    got = network.first(inputs)

    assert rounded.dtype == FORMAT and got.dtype == torch.bfloat16
    assert error(got, exact) < 3e-3
    assert error(got, inputs.double() @ weight.T + bias) < 0.05
    assert error(got - bias, plain - bias) > 0.005 or size < 1e-3  # it is not the plain product
    assert got[3].equal(layer.bias)


def test_a_small_lora_is_exact_beside_the_rounded_weight(feed, tmp_path):
    """Its effect on the answer is that of its two thin products; rounded with the weight it would not be.

    The answers with and without it are each rounded to bfloat16 once, so their difference can be half a unit of each
    off, and the inner product another unit.
    """
    shelf, patch, inputs = Shelf(tmp_path, feed), low_rank(size=0.005), rows()
    effect = 0.5 * inputs.double() @ patch.down.double().T @ patch.up.double().T
    before = feed.first(inputs)
    with shelf.wearing(shelf.add("a", patch)):
        after = feed.first(inputs)
        shown = after.double() - before.double()
        inner = 0.5 * (inputs.double() @ patch.down.double().T).abs() @ patch.up.double().abs().T
        assert ((shown - effect).abs() <= 2**-8 * (before.abs() + after.abs()) + 2**-7 * inner).all()
        feed.first.wear_weight()  # what this is not: the patched weight, rounded
        rounded = feed.first(inputs).double() - before.double()
    assert error(shown, effect) < 0.2 * error(rounded, effect)
    shelf.adapters.restore()
    assert feed.first(inputs).equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("budgets", [Budgets(), Budgets(0, 0), Budgets(group_on=frozenset({"cpu"}))])
def test_sets_go_on_and_off_and_the_answers_are_those_of_a_fresh_layer(feed, tmp_path, dtype, budgets):
    """Stacks, other ranks, sets that come again from kept weights: what was on before leaves no trace."""
    shelf, inputs = Shelf(tmp_path, feed, budgets), rows()
    bare, weight = feed.first(inputs), feed.first.weight.clone()
    a, b = shelf.add("a", low_rank(0, 4, 1.0, dtype)), shelf.add("b", low_rank(5, 20, 1.0, dtype))
    dora = shelf.add("dora", Decomposed(low_rank(7), torch.rand(OUT, generator=seeded(3)) + 1, 0))
    full = shelf.add("full", Difference(torch.randn(OUT, IN, generator=seeded(4)) * 0.1))
    seen = {}
    for picked in [(a,), (b,), (a, b), (), (a,), (dora,), (a,), (full, b), (), (b,), (dora,), (), (a,), (a, b)] * 2:
        with shelf.wearing(*picked):
            got = feed.first(inputs)
            assert got.equal(seen.setdefault(picked, got))
            assert error(got, F.linear(inputs.double(), feed.first.weight.double(), feed.first.bias.double())) < 0.05
    assert len({float(got.double().sum()) for got in seen.values()}) == len(seen)
    shelf.adapters.restore()
    assert feed.first(inputs).equal(bare) and feed.first.weight.equal(weight)


def test_factors_stay_in_place_until_a_rank_is_larger_than_any_before(feed, tmp_path):
    """Recorded graphs go on seeing them; growth is told."""
    shelf, told = Shelf(tmp_path, feed), []
    listen([feed.first], lambda: told.append(1))
    places = []
    for seed, rank in enumerate((4, 16, 2, 17, 30, 5)):
        with shelf.wearing(shelf.add(str(seed), low_rank(seed, rank))):
            places.append((feed.first.up.data_ptr(), feed.first.down.data_ptr(), feed.first.rounded.data_ptr()))
    assert len(told) == 2
    assert len(set(places[:3])) == 1 and len(set(places[3:])) == 1
    assert len({place[2] for place in places}) == 1


class Failing(Difference):
    """Runs out of memory while it is applied."""

    def patched(self, weight, strength):
        raise MemoryError


def test_a_failure_on_the_way_leaves_a_bare_layer(feed, tmp_path):
    """Its neighbour was told of a LoRA that is not on after all."""
    shelf, inputs = Shelf(tmp_path, feed), rows()
    bare = feed.first(inputs)
    contents = {
        Target("unet", "ff.net.0.proj", "weight"): low_rank(size=1.0),
        Target("unet", "other", "weight"): Failing(torch.zeros(IN, IN)),
    }
    bad = shelf.add("bad", low_rank())
    shelf._contents["bad"] = LoraContents(contents)
    with pytest.raises(MemoryError), shelf.wearing(bad):
        raise AssertionError("not reached")
    assert feed.first(inputs).equal(bare)


def test_a_lora_that_is_not_low_rank_is_rounded_with_its_weight_and_the_log_says_so(feed, tmp_path, caplog):
    """The weight as patched, in float8."""
    shelf = Shelf(tmp_path, feed)
    with (
        caplog.at_level(logging.INFO, logger=fp8.__name__),
        shelf.wearing(shelf.add("full", Difference(torch.randn(OUT, IN) * 0.1))),
    ):
        rounded, scales = to_float8(feed.first.weight)
        assert feed.first.rounded.equal(rounded) and feed.first.scales.equal(scales.T)
    assert "not low-rank is rounded to float8" in caplog.text


def test_it_can_be_moved_copied_and_cast(feed, tmp_path):
    """A copy has factors of its own; in another format the layer multiplies by its patched weight as it is."""
    shelf, inputs = Shelf(tmp_path, feed), rows()
    with shelf.wearing(shelf.add("a", low_rank(size=1.0))):
        with_lora = feed.first(inputs)
        twin = copy.deepcopy(feed)
        feed.to("cpu")
        assert feed.first(inputs).equal(with_lora) and twin.first(inputs).equal(with_lora)
    shelf.adapters.restore()
    assert twin.first(inputs).equal(with_lora) and not feed.first(inputs).equal(with_lora)
    twin.float()
    assert twin.first.rounded.dtype == FORMAT
    assert twin.first(inputs.float()).equal(F.linear(inputs.float(), twin.first.weight, twin.first.bias))


def answer(unet, side=16):
    generator = seeded(1)
    added = {
        "text_embeds": torch.randn(2, 24, generator=generator).bfloat16(),
        "time_ids": torch.full((2, 6), 512.0).bfloat16(),
    }
    with torch.inference_mode():
        return unet(
            torch.randn(2, 4, side, side, generator=generator).bfloat16(),
            torch.full((2,), 500),
            encoder_hidden_states=torch.randn(2, 77, 40, generator=generator).bfloat16(),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return base_unet(4).requires_grad_(False).bfloat16().eval()


def test_a_unets_large_layers_are_in_float8_and_its_answer_is_near(unet):
    """Attention's projections of the picture, and the feed-forward layers; not those of the prompt."""
    plain = copy.deepcopy(unet)
    accelerate(unet, Accel(fp8=True), CPU)
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules())
    in_float8 = {name for name, module in unet.named_modules() if isinstance(module, Fp8Linear)}
    assert len(in_float8) == 8 * blocks > 0
    assert not any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in in_float8)
    assert 1e-4 < error(answer(unet), answer(plain)) < 0.1


@pytest.mark.parametrize("switches", ["fp8,fuse_projections", "fp8,auto", "prepack,fp8,keep_prompts"])
def test_what_fuses_projections_is_off_beside_it(unet, switches, caplog):
    """Clearly: the log says what, and queries, keys and values are in float8 each."""
    accelerate(unet, Accel.parse(switches), CPU)
    assert not any(isinstance(module, FusedAttention) for module in unet.modules())
    assert any(isinstance(module, Fp8Linear) for module in unet.modules())
    assert "off, fp8 multiplies queries, keys and values apart" in caplog.text


def test_in_other_formats_it_is_off_and_auto_never_has_it(unet, caplog):
    """float32 stays float32, and what is exact stays exact."""
    unet.float()
    accelerate(unet, Accel(fp8=True), CPU)
    assert "fp8 is off: the weights are in torch.float32" in caplog.text
    unet.bfloat16()
    accelerate(unet, Accel(auto=True), CPU)
    assert not any(isinstance(module, Fp8Linear) for module in unet.modules())


def test_where_the_product_cannot_be_had_it_is_off(monkeypatch, caplog, unet):
    """As on a GPU before capability 8.9."""

    def refuse(*args, **kwargs):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    accelerate(unet, Accel(fp8=True), CPU)
    assert "fp8 is off: cpu cannot multiply so (torch._scaled_mm is only supported" in caplog.text
    assert not any(isinstance(module, Fp8Linear) for module in unet.modules())
