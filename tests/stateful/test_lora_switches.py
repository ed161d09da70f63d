"""A random walk through LoRA sets, strengths, networks and failures: after it every bit of the model is back.

The machine checks after every step that each network is either exactly what its set makes of the model's own bits
(worked out from nothing, in another model that has no history) or, after a failure, exactly the model's own.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import nn

from impasto.engine.memory import process_memory
from impasto.lora.apply import Adapters
from impasto.lora.budgets import Budgets
from impasto.lora.contents import LoraContents
from impasto.lora.keys import Target
from impasto.lora.patch import LowRank, Patch
from impasto.types import LoraRef

NETWORKS = ("unet", "refiner", "text_encoder")
FILES = 6
BUDGETS = [Budgets(), Budgets(0, 0, 0), Budgets(30_000, 20_000, 500)]  # all, nothing, and a few files and sets
GROUPED = Budgets(group=2 * 12 * 8 * 4, group_on=frozenset({"cpu"}))  # two weights at a time, as on a GPU
picks = st.lists(st.tuples(st.integers(0, FILES - 1), st.sampled_from([-1.0, 0.0, 0.3, 1.0, 4.0])), max_size=5)
parts = st.lists(st.sampled_from(NETWORKS), max_size=3, unique=True)


@dataclass
class Fuse:
    """Burns down while patches are applied; the one that ends it fails. ``None``: none does."""

    left: int | None = None
    error: type[BaseException] = MemoryError

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise self.error


@dataclass(frozen=True, slots=True, eq=False)
class Bent(Patch):
    """Neither low-rank nor additive, and it may fail."""

    kind: ClassVar[str] = "bent"
    additive: ClassVar[bool] = False
    rank = None
    amount: torch.Tensor
    fuse: Fuse = field(repr=False)

    @property
    def shape(self):
        return tuple(self.amount.shape)

    def fits(self, shape):
        return self.amount.shape == shape

    def patched(self, weight, strength):
        self.fuse.burn()
        return weight.float() + strength * self.amount * weight.float().sin()


def make_network(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    network = nn.ModuleDict(
        {
            "a": nn.Linear(12, 8),
            "b": nn.Linear(8, 12),
            "c": nn.Conv2d(3, 5, 3),
            "n": nn.LayerNorm(8),
            "d": nn.Linear(12, 8),
            "e": nn.Linear(12, 8),
            "f": nn.Linear(12, 8),
        }
    )
    network["d"].weight = network["a"].weight  # shared
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network.to(torch.bfloat16).requires_grad_(False)


class Files:
    """Random LoRA files: each has patches for some of the weights of some of the networks."""

    def __init__(self, folder: Path, networks, fuse: Fuse, count: int = FILES) -> None:
        rng = np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        self.paths, self._contents = [], {}
        for index in range(count):
            patches: dict[Target, Patch] = {}
            for name, network in networks.items():
                for module in network:
                    for parameter in ("weight", "bias"):
                        if rng.random() < 0.4:
                            shape = getattr(network[module], parameter).shape
                            patches[Target(name, module, parameter)] = self._patch(shape, rng, generator, fuse)
            path = folder / f"{index}.safetensors"
            path.write_bytes(b"x")
            self.paths.append(str(path))
            self._contents[path.resolve()] = LoraContents(patches)

    @staticmethod
    def _patch(shape, rng, generator, fuse) -> Patch:
        if len(shape) > 1 and rng.random() < 0.7:
            down = torch.randn(3, *shape[1:], generator=generator).to([torch.bfloat16, torch.float16][rng.integers(2)])
            return LowRank(down, torch.randn(shape[0], 3, generator=generator).to(down.dtype), 0.5)
        return Bent(torch.randn(shape, generator=generator), fuse)

    def read(self, path, names, field):
        return self._contents[path]


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def identical(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class Switches(RuleBasedStateMachine):
    """Sets go on, whole or on some networks, with failures in between."""

    budgets = Budgets()

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.fuse = Fuse()
        self.networks = {name: make_network(i) for i, name in enumerate(NETWORKS)}
        self.own = {name: snapshot(network) for name, network in self.networks.items()}
        self.files = Files(Path(self.folder.name), self.networks, self.fuse)
        self.adapters = Adapters(self.networks, self.budgets, self.files.read)
        self.believed: dict[str, tuple] = dict.fromkeys(NETWORKS, ())

    def refs(self, picked):
        return [LoraRef(self.files.paths[index], scale) for index, scale in picked]

    def expected(self, name):
        """The network's bits from a model that was never patched before."""
        network = copy.deepcopy(self.networks[name])
        network.load_state_dict(self.own[name])
        fresh = Adapters({name: network}, self.budgets, self.files.read)
        with fresh.active(fresh.resolve(self.refs(self.believed[name]))):
            return snapshot(network)

    @rule(picked=picks, on=parts)
    def put_on(self, picked, on):
        with self.adapters.active(self.adapters.resolve(self.refs(picked)), *on):
            for name in on or NETWORKS:
                self.believed[name] = tuple(picked)

    @rule(picked=picks, on=parts, after=st.integers(0, 6), error=st.sampled_from([MemoryError, KeyboardInterrupt]))
    def fail(self, picked, on, after, error):
        self.fuse.left, self.fuse.error = after, error
        try:
            self.put_on(picked, on)
        except error:
            for name in on or NETWORKS:  # as they should be, as they were, or their own
                seen = snapshot(self.networks[name])
                if identical(seen, self.own[name]):
                    self.believed[name] = ()
                else:
                    before, self.believed[name] = self.believed[name], tuple(picked)
                    if not identical(seen, self.expected(name)):
                        self.believed[name] = before
        finally:
            self.fuse.left = None

    @rule()
    def restore(self):
        self.adapters.restore()
        for name, network in self.networks.items():
            self.believed[name] = ()
            assert identical(snapshot(network), self.own[name])

    @invariant()
    def every_network_is_what_its_set_makes_of_the_model(self):
        for name, network in self.networks.items():
            assert identical(snapshot(network), self.expected(name))

    def teardown(self):
        self.restore()
        self.folder.cleanup()


class SwitchesWithoutMemory(Switches):
    """Nothing is kept from one switch to the next."""

    budgets = BUDGETS[1]


class SwitchesInLittleMemory(Switches):
    """Some of it is kept, and dropped all the time."""

    budgets = BUDGETS[2]


class SwitchesInGroups(Switches):
    """Weights of one shape are written together."""

    budgets = GROUPED


few = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestSwitches = Switches.TestCase
TestSwitches.settings = few
TestSwitchesWithoutMemory = SwitchesWithoutMemory.TestCase
TestSwitchesWithoutMemory.settings = few
TestSwitchesInLittleMemory = SwitchesInLittleMemory.TestCase
TestSwitchesInLittleMemory.settings = few
TestSwitchesInGroups = SwitchesInGroups.TestCase
TestSwitchesInGroups.settings = few


@pytest.mark.parametrize("budgets", [*BUDGETS, GROUPED], ids=["default", "none", "small", "grouped"])
def test_after_a_thousand_random_switches_every_bit_is_back_and_no_memory_is_lost(tmp_path, budgets):
    """Any files, strengths and stacks, with a failure now and then; memory after 1,000 is that after the first 10s."""
    fuse = Fuse()
    networks = {name: make_network(i) for i, name in enumerate(NETWORKS)}
    own = {name: snapshot(network) for name, network in networks.items()}
    files = Files(tmp_path, networks, fuse)
    adapters = Adapters(networks, budgets, files.read)
    rng = np.random.default_rng(7)
    failures, tensors = 0, {}
    for switch in range(1, 1001):
        picked = rng.choice(FILES, rng.integers(0, 6), replace=True)
        refs = [LoraRef(files.paths[i], float(rng.choice([-1, 0.5, 1, 4]))) for i in picked]
        fuse.left = int(rng.integers(0, 4)) if rng.random() < 0.1 else None
        try:
            with adapters.active(adapters.resolve(refs)):
                pass
        except MemoryError:
            failures += 1
        if switch in (10, 1000):
            adapters.restore()
            gc.collect()
            held = adapters.held_bytes
            tensors[switch] = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()), held["own"]
    fuse.left = None
    adapters.restore()
    assert failures > 20
    assert all(identical(snapshot(network), own[name]) for name, network in networks.items())
    assert adapters.held_bytes["prepared"] <= budgets.prepared
    if budgets.prepared == 0:  # otherwise the cache of prepared sets may fill up meanwhile, as far as its budget
        assert tensors[1000] == tensors[10]


def test_memory_of_the_process_after_a_thousand_switches_is_that_after_ten(tmp_path):
    """Weights of 8 MiB, four sets that come again: the resident size does not grow by half of that."""
    if process_memory("VmRSS") is None:
        pytest.skip("this system does not tell")
    network = nn.ModuleDict({str(i): nn.Linear(512, 512, bias=False) for i in range(8)}).requires_grad_(False)
    patches = {}
    for index in range(4):
        patches[tmp_path / str(index)] = LoraContents(
            {Target("unet", name, "weight"): LowRank(torch.randn(4, 512), torch.randn(512, 4), 1.0) for name in network}
        )
        (tmp_path / str(index)).write_bytes(b"x")
    adapters = Adapters({"unet": network}, Budgets(prepared=2**18), lambda path, names, field: patches[path])
    sizes = {}
    for switch in range(1, 1001):
        with adapters.active(adapters.resolve([LoraRef(str(tmp_path / str(switch % 4)))])):
            pass
        if switch in (10, 1000):
            gc.collect()
            sizes[switch] = process_memory("VmRSS"), adapters.held_bytes
    assert sizes[1000][1] == sizes[10][1]
    assert sizes[1000][0] - sizes[10][0] < 4 * 2**20
