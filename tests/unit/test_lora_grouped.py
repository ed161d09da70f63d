"""Weights written in groups: the sums of the one-by-one way, in a few operations however many weights there are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from impasto.errors import LoraError
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.lora.contents import LoraContents
from impasto.lora.grouped import Alone, Group, Images, Member, batches, divided, in_pieces, placed
from impasto.lora.keys import Target
from impasto.lora.merge import Image, Product, Recipe, planned, recipe
from impasto.lora.patch import LowRank, Patch
from impasto.lora.patches.decomposed import Decomposed
from impasto.types import LoraRef

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HERE = frozenset({"cpu"})
STEP = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of neighbouring numbers, at most
GROUPED = Budgets(group_on=HERE)
MANY = 2**28


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(shape, rank=4, seed=0, dtype=torch.bfloat16, scale=0.5) -> LowRank:
    generator = seeded(seed)
    down = torch.randn(rank, *shape[1:], generator=generator).to(dtype)
    return LowRank(down, torch.randn(shape[0], rank, generator=generator).to(dtype), scale)


def named(tensors) -> dict[Target, torch.Tensor]:
    return {Target("unet", str(index), "weight"): tensor for index, tensor in enumerate(tensors)}


def recipes(stacks, weight, most, devices) -> dict[Target, Recipe]:
    """Stacks, made ready for their weights."""
    return placed(((target, planned(stack, weight(target))) for target, stack in stacks.items()), weight, most, devices)


def one_by_one(made: Recipe, weight: torch.Tensor) -> torch.Tensor:
    """What the recipe makes of a weight in float32, without the CPU's bfloat16 product."""
    got = torch.empty_like(weight)
    (replace(made, fused=False) if isinstance(made, Product) else made).write(got, weight)
    return got


def write_all(made, weights) -> tuple[dict[Target, torch.Tensor], list]:
    """Write copies of the weights in batches; return them, and the batches."""
    got = {target: torch.full_like(weight, torch.nan) for target, weight in weights.items()}
    found = list(batches(made))
    for batch in found:
        batch.write([got[target] for target in batch.targets], [weights[target] for target in batch.targets])
    return got, found


@given(
    st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(1, 12)), max_size=60),
    st.integers(0, 40),
)
def test_whatever_is_divided_is_all_there_in_groups_of_one_kind_within_the_bytes(items, most):
    """Nothing lost or twice; what is of no kind, or too large, is alone; no two groups of a kind would fit in one."""
    described = [(index, kind, size) for index, (kind, size) in enumerate(items)]
    groups = list(divided(iter(described), most))

    assert sorted(item for group in groups for item in group) == list(range(len(items)))
    held = Counter()
    for group in groups:
        kinds = {items[item][0] for item in group}
        size = sum(items[item][1] for item in group)
        assert len(kinds) == 1 and group == sorted(group)
        assert len(group) == 1 or (size <= most and None not in kinds)
        held[next(iter(kinds))] += 1
    for kind in "abc":
        sizes = [size for found, size in items if found == kind and size <= most]
        assert held[kind] <= 2 * math.ceil(sum(sizes) / most) + (len(items) - len(sizes)) if most else True


def test_a_group_is_handed_out_as_soon_as_it_is_full():
    """What waits is one group of each kind at most, however long the list: that bounds the memory of preparing."""
    taken = []

    def items():
        for index in range(100):
            taken.append(index)
            yield index, index % 2, 10

    groups = divided(items(), 30)
    assert next(groups) == [0, 2, 4] and len(taken) == 7


stacks_of_kinds = st.lists(
    st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from(DTYPES), st.sampled_from([0.25, 0.5, 3.0]), st.integers(0, 9)),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=8,
)


@given(
    stacks=stacks_of_kinds,
    dtype=st.sampled_from(DTYPES),
    shapes=st.lists(st.sampled_from([(8, 12), (12, 8), (6, 4, 3, 3)]), min_size=8, max_size=8),
    most=st.sampled_from([0, 800, MANY]),
)
def test_random_stacks_become_what_they_do_one_by_one(stacks, dtype, shapes, most):
    """Any ranks, formats, strengths and shapes, in groups of any size."""
    weights = named(torch.randn(shape, generator=seeded(i)).to(dtype) for i, shape in enumerate(shapes[: len(stacks)]))
    wanted = {
        target: [(low_rank(weight.shape, rank, seed, stored), strength) for rank, stored, strength, seed in stack]
        for (target, weight), stack in zip(weights.items(), stacks, strict=True)
    }
    made = recipes(wanted, weights.__getitem__, most, HERE)
    got, _ = write_all(made, weights)
    for target, weight in weights.items():
        single = recipe(wanted[target], weight)
        if isinstance(made[target], Member):
            exact = one_by_one(single, weight)  # a product of several matrices may add up in another order
            assert torch.allclose(got[target].float(), exact.float(), rtol=STEP[dtype], atol=1e-5)
            assert made[target].nbytes == single.nbytes and made[target].risky == single.risky
        else:
            alone = torch.empty_like(weight)
            single.write(alone, weight)
            assert torch.equal(got[target], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_real_widths_are_the_float32_sum_rounded_once(dtype, stored):
    """Equal to float64, rounded, in all but the few places next to the middle of two numbers."""
    shape = (640, 1280)
    weights = named(torch.randn(shape, generator=seeded(i)).to(dtype) for i in range(3))
    patches = {target: low_rank(shape, 32, i, stored) for i, target in enumerate(weights)}
    got, found = write_all(
        recipes({t: [(p, 0.7)] for t, p in patches.items()}, weights.__getitem__, MANY, HERE), weights
    )
    assert [type(batch) for batch in found] == [Group]
    for target, weight in weights.items():
        patch = patches[target]
        exact = (weight.double() + 0.7 * patch.scale * (patch.up.double() @ patch.down.double())).to(dtype)
        most = 2e-4 if dtype == torch.bfloat16 else 2e-3 if dtype == torch.float16 else 1.0
        assert (got[target] != exact).float().mean() < most
        torch.testing.assert_close(got[target], exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@given(st.lists(st.floats(-(2.0**15), 2.0**15, width=32), min_size=1, max_size=40))
def test_pieces_add_up_to_the_number(numbers):
    """Three in bfloat16 exactly, but for what float32 itself holds with fewer digits; two in float16 nearly."""
    up = torch.tensor(numbers)
    for dtype, least in ((torch.bfloat16, 2.0**-100), (torch.float16, math.inf)):
        pieces = in_pieces(up[:, None], dtype)
        left = (pieces.double().sum(-1) - up.double()).abs()
        assert pieces.dtype == dtype
        if dtype == torch.bfloat16:
            assert (left[up.abs() >= least] == 0).all() and (left <= 2.0**-120).all()
        else:
            assert (left <= 2.0**-22 * up.abs() + 2.0**-25).all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_group_of_pieces_makes_the_same_sums(stored):
    """LoRAs of different strengths, as a GPU multiplies them: the float32 sum rounded once, and the factors whole."""
    weights = named(torch.randn(96, 80, generator=seeded(i)).bfloat16() for i in range(3))
    stack = [(low_rank((96, 80), 8, i, stored), 0.3 + 0.1 * i) for i in range(3)]
    made = recipes(dict.fromkeys(weights, stack), weights.__getitem__, MANY, HERE)
    group = next(iter(made.values())).group
    assert group.up.dtype == torch.float32 and group.down.dtype == stored
    pieces = replace(group, up=in_pieces(group.up, stored))
    got = [torch.empty_like(weight) for weight in weights.values()]
    pieces.write(got, list(weights.values()))
    for one, weight in zip(got, weights.values(), strict=True):
        exact = weight.double() + sum(s * p.scale * (p.up.double() @ p.down.double()) for p, s in stack)
        assert (one != exact.bfloat16()).float().mean() < 1e-3
        torch.testing.assert_close(one, exact.bfloat16(), rtol=2**-7, atol=1e-5)
    up, down, alpha = Member(pieces, 1).low_rank
    assert (
        torch.allclose(up, group.up[1], rtol=2**-21, atol=1e-6) and down.equal(group.down[1]) and alpha == group.alpha
    )
    assert Member(pieces, 0).nbytes == pieces.up[0].nbytes + pieces.down[0].nbytes


def test_what_is_no_low_rank_product_stays_alone():
    """DoRA, a stack with one, another rank, strides of its own, a weight alone: each by itself, the rest in a group."""
    weights = named(torch.randn(8, 12, generator=seeded(i)) for i in range(7))
    a, b, c, dora, mixed, ranked, turned = weights
    weights[turned] = torch.randn(12, 8, generator=seeded(9)).T
    decomposed = Decomposed(low_rank((8, 12)), torch.rand(8) + 1, 0)
    plain = low_rank((8, 12))
    wanted = {target: [(plain, 1.0)] for target in (a, b, c, turned)}
    wanted |= {
        dora: [(decomposed, 1.0)],
        mixed: [(decomposed, 1.0), (plain, 1.0)],
        ranked: [(low_rank((8, 12), 3), 1.0)],
    }
    made = recipes(wanted, weights.__getitem__, MANY, HERE)
    assert {target for target, one in made.items() if isinstance(one, Member)} == {a, b, c}
    got, found = write_all(made, weights)
    assert sorted(len(batch.targets) for batch in found) == [1, 1, 1, 1, 3]
    for target, weight in weights.items():
        alone = torch.empty_like(weight)
        recipe(wanted[target], weight).write(alone, weight)
        assert torch.equal(got[target], alone)


def test_a_cpu_has_no_groups_unless_told():
    """By default weights on a CPU are written one by one, with the file's own tensors."""
    weights = named(torch.randn(8, 12, generator=seeded(i)) for i in range(3))
    wanted = {target: [(low_rank((8, 12)), 1.0)] for target in weights}
    made = recipes(wanted, weights.__getitem__, Budgets().group, Budgets().group_on)
    assert all(isinstance(one, Product) for one in made.values())
    assert "cuda" in Budgets().group_on and 0 < Budgets().group <= MANY


def test_one_of_a_group_asks_for_all_of_it_and_nothing_else_does():
    """Bits of a group do not depend on what was on before; what is as wanted in whole is not written."""
    weights = named(torch.randn(shape, generator=seeded(0)) for shape in [(8, 12)] * 3 + [(12, 8)] * 2)
    wanted = {target: [(low_rank(weight.shape), 1.0)] for target, weight in weights.items()}
    made = recipes(wanted, weights.__getitem__, MANY, HERE)
    first, *_ = weights
    (only,) = batches({first: made[first]})
    assert only.targets == tuple(weights)[:3]
    assert list(batches({})) == []


def test_kept_weights_are_copied_in_one_go():
    """A set whose patched weights are kept is one copy for each format."""
    weights = named([*torch.randn(3, 4, 4, generator=seeded(0)), torch.zeros(4, dtype=torch.bfloat16)])
    made = {target: Image(weight + 1) for target, weight in weights.items()}
    got, found = write_all(made, weights)
    assert [(type(batch), len(batch.targets)) for batch in found] == [(Images, 3), (Images, 1)]
    assert all(torch.equal(got[target], weight + 1) for target, weight in weights.items())


class Launches(TorchDispatchMode):
    """Counts the operations that a device would have to start: all but views and empty memory."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.name():
            self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Layers:
    """A network of equal layers, and files with a low-rank patch for each."""

    def __init__(self, folder, count, budgets=GROUPED, dtype=torch.bfloat16):
        self.network = nn.ModuleList(nn.Linear(16, 24) for _ in range(count)).requires_grad_(False).to(dtype)
        self.own = [layer.weight.clone() for layer in self.network]
        self.folder, self.contents = folder, {}
        self.adapters = Adapters({"unet": self.network}, budgets, lambda path, names, field: self.contents[path.name])

    def add(self, name, make) -> LoraRef:
        patches = {Target("unet", str(i), "weight"): make(i) for i in range(len(self.network))}
        self.contents[name] = LoraContents({target: patch for target, patch in patches.items() if patch})
        (self.folder / name).write_bytes(b"x")
        return LoraRef(str(self.folder / name))

    def plain(self, name, seed) -> LoraRef:
        return self.add(name, lambda i: low_rank((24, 16), seed=100 * seed + i))

    def put_on(self, *refs):
        with self.adapters.active(self.adapters.resolve(refs)):
            return [layer.weight.clone() for layer in self.network]

    def is_back(self):
        return all(torch.equal(layer.weight, own) for layer, own in zip(self.network, self.own, strict=True))


NO_IMAGES = replace(GROUPED, prepared=2**20)


@pytest.mark.parametrize(("budgets", "grows"), [(NO_IMAGES, False), (replace(NO_IMAGES, group=0), True)])
def test_operations_of_a_switch_grow_with_groups_and_not_with_modules(tmp_path, budgets, grows):
    """Between known sets, and back to the model's own: the same few for 4 modules and for 40. One by one they grow."""
    counts = {}
    for modules in (4, 40):
        (folder := tmp_path / f"{modules}-{grows}").mkdir()
        layers = Layers(folder, modules, replace(budgets, prepared=4 * modules * 2000))
        layers.adapters._image_budget = 0  # so that factors are used, as where patched weights are too large to keep
        sets = [layers.plain("a", 1), layers.plain("b", 2)]
        for one in sets:
            layers.put_on(one)
        resolved = layers.adapters.resolve(sets[:1])
        with Launches() as switch, layers.adapters.active(resolved):
            pass
        with Launches() as back:
            layers.adapters.restore()
        assert layers.is_back()
        counts[modules] = switch.names.total(), back.names.total()
    if grows:
        assert counts[40][0] >= 10 * counts[4][0] / 2 and counts[40][0] >= 40
    else:
        assert counts[4] == counts[40]
        assert counts[40][0] <= 8 and counts[40][1] == 1


def test_a_groups_bytes_bound_it(tmp_path):
    """Ten modules in groups of at most three: four groups, and bits as ever."""
    most = 3 * 24 * 16 * 4
    small, whole = (Layers(tmp_path, 10, replace(GROUPED, group=group)) for group in (most, MANY))
    whole.network.load_state_dict(small.network.state_dict())
    reference = whole.put_on(whole.plain("a", 1))
    made = recipes(
        {t: [(p, 1.0)] for t, p in whole.contents["a"].patches.items()},
        lambda target: small.network[int(target.module)].weight,
        most,
        HERE,
    )
    assert len(list(batches(made))) == 4
    assert all(torch.equal(a, b) for a, b in zip(small.put_on(small.plain("a", 1)), reference, strict=True))


def test_switches_between_overlapping_sets_keep_the_bits_of_each_and_give_every_bit_back(tmp_path):
    """Files for some of the layers, alone and stacked, in any order, from the second time on from kept weights."""
    layers = Layers(tmp_path, 9)
    odd = layers.add("odd", lambda i: low_rank((24, 16), seed=i) if i % 2 else None)
    few = layers.add("few", lambda i: low_rank((24, 16), rank=2, seed=50 + i) if i < 4 else None)
    every = layers.plain("every", 3)
    seen = {}
    for turn, picked in enumerate([(odd,), (odd, few), (every,), (few,), (odd,), (every, odd), (), (odd, few)] * 4):
        got = layers.put_on(*picked)
        before = seen.setdefault(picked, got)
        assert all(torch.equal(a, b) for a, b in zip(got, before, strict=True)), turn
    layers.adapters.restore()
    assert layers.is_back()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [math.inf, math.nan, 1e30])
def test_one_weight_that_is_not_finite_is_found_in_its_group(tmp_path, dtype, scale):
    """The request's field is named, and every bit is the model's own."""
    layers = Layers(tmp_path, 6, dtype=dtype)
    bad = 1e30 if math.isfinite(scale) else scale
    path = layers.add(
        "bad",
        lambda i: (
            low_rank((24, 16), seed=i) if i != 3 else LowRank(torch.full((4, 16), bad), torch.full((24, 4), bad), 1.0)
        ),
    )
    with pytest.raises(LoraError, match="not finite; lower its scale") as caught:
        layers.put_on(path)
    assert caught.value.field == "loras.0.path"
    assert layers.is_back()


@pytest.mark.parametrize(("size", "refused"), [(65504.0, False), (65519.0, False), (65520.0, True), (-7e4, True)])
def test_a_group_in_half_precision_is_refused_where_rounding_overflows(tmp_path, size, refused):
    """Exactly as one by one: what still rounds to the largest number is finite."""
    outcomes = []
    for folder, budgets in (("grouped", GROUPED), ("alone", replace(GROUPED, group=0))):
        (tmp_path / folder).mkdir()
        layers = Layers(tmp_path / folder, 3, budgets, torch.float16)
        for layer in layers.network:
            layer.weight.zero_()
        path = layers.add("a", lambda i: LowRank(torch.full((1, 16), size), torch.ones(24, 1), 1.0))
        try:
            outcomes.append(layers.put_on(path))
        except LoraError:
            outcomes.append(None)
    assert [outcome is None for outcome in outcomes] == [refused, refused]
    if not refused:
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Failing(Patch):
    """Runs out of memory while it is applied."""

    kind: ClassVar[str] = "failing"
    additive: ClassVar[bool] = False
    rank = None
    shape = ()

    def fits(self, shape):
        return True

    def patched(self, weight, strength):
        raise MemoryError


@pytest.mark.parametrize("after", [0, 5])
def test_a_failure_between_groups_leaves_the_model_its_own_bits(tmp_path, after):
    """One weight fails before or after the others' group was written: all are the model's own, and it goes on."""
    layers = Layers(tmp_path, 6)
    good, bad = layers.plain("good", 1), layers.add("bad", lambda i: Failing() if i == after else low_rank((24, 16)))
    reference = layers.put_on(good)
    with pytest.raises(MemoryError):
        layers.put_on(bad)
    assert layers.is_back()
    assert all(torch.equal(a, b) for a, b in zip(layers.put_on(good), reference, strict=True))


def test_a_failure_in_the_middle_of_a_group_leaves_the_model_its_own_bits(tmp_path, monkeypatch):
    """Half of a group's weights were written when it ended."""
    layers = Layers(tmp_path, 6)
    path = layers.plain("a", 1)
    write = Group.write

    def cut_short(group, weights, pristine):
        write(replace(group, up=group.up[:3], down=group.down[:3]), weights[:3], pristine[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Group, "write", cut_short)
    with pytest.raises(KeyboardInterrupt):
        layers.put_on(path)
    assert layers.is_back()
    monkeypatch.undo()
    assert not torch.equal(layers.put_on(path)[0], layers.own[0])


def test_a_written_weight_counts_up_its_version(tmp_path):
    """Packed weights and kept prompts notice that a weight has changed, and that it went back."""
    layers = Layers(tmp_path, 3)
    versions = [[layer.weight._version for layer in layers.network]]
    layers.put_on(layers.plain("a", 1))
    versions.append([layer.weight._version for layer in layers.network])
    layers.adapters.restore()
    versions.append([layer.weight._version for layer in layers.network])
    assert all(a < b < c for a, b, c in zip(*versions, strict=True))


def test_memory_that_is_kept_is_counted_in_groups_too(tmp_path):
    """The stacked factors of a set are as many bytes as one by one, and bounded by the budget."""
    held = []
    for folder, budgets in (("grouped", GROUPED), ("alone", replace(GROUPED, group=0))):
        (tmp_path / folder).mkdir()
        layers = Layers(tmp_path / folder, 5, budgets)
        layers.put_on(layers.plain("a", 1))
        held.append(layers.adapters.held_bytes["prepared"])
    assert held[0] == held[1] > 5 * 4 * (24 + 16) * 2


def test_a_member_can_be_written_by_itself():
    """It is a recipe like any other."""
    weights = named(torch.randn(8, 12, generator=seeded(i)).bfloat16() for i in range(3))
    wanted = {target: [(low_rank((8, 12), seed=i), 1.0)] for i, target in enumerate(weights)}
    made = recipes(wanted, weights.__getitem__, MANY, HERE)
    together, _ = write_all(made, weights)
    for target, weight in weights.items():
        got = torch.empty_like(weight)
        made[target].write(got, weight)
        assert torch.equal(got, together[target])
        assert Alone(target, made[target]).write([got], [weight]) is None
