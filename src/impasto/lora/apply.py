"""Which LoRAs are on a model's networks: sets of files put on, exchanged and taken off, bit for bit.

Knows networks, files and strengths. Knows no requests or steps, and no formulas: what a stack of patches makes of a
weight is ``merge``'s, writing and putting back is ``weights``'.

Each network has a set of its own. One that is on costs nothing; another one is written in one pass, each weight
straight from the model's own bits, so no error ever accumulates.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from impasto.errors import LoraError
from impasto.lora.budgets import Budgets
from impasto.lora.cache import ITEM_BYTES, ByteCache, FileState, ParsedFiles
from impasto.lora.contents import LoraContents
from impasto.lora.courtesy import courteous, give_way
from impasto.lora.formats import read_lora
from impasto.lora.grouped import placed
from impasto.lora.keys import Target, TargetNames
from impasto.lora.merge import Image, Plan, Recipe, planned
from impasto.lora.patch import Patch
from impasto.lora.weights import Patched, Weights
from impasto.types import LoraRef

Reader = Callable[[Path, TargetNames, str], LoraContents]
Stop = Callable[[], bool]

TEXT_NETWORKS = ("text_encoder", "text_encoder_2")
Name = tuple[object, ...]  # of what a weight becomes: files and strengths
IMAGE_SHARE = 2  # a set's patched weights may take one part in so many of the budget, so that two sets fit


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file as it was when a request asked for it, and how strongly to apply it."""

    path: Path
    modified: int  # nanoseconds since 1970
    size: int  # bytes
    scale: float
    text_scale: float | None = None  # for the text encoders; None: like ``scale``
    field: str = dataclasses.field(default="loras", compare=False)  # the request field that named it, for errors
    networks: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)  # that it has patches for

    @property
    def state(self) -> FileState:
        """The file without its strength."""
        return FileState(self.path, self.modified, self.size)

    @property
    def text_strength(self) -> float:
        """How strongly it is to act on how prompts are read, whatever it has for that."""
        return self.scale if self.text_scale is None else self.text_scale

    def strength(self, network: str) -> float:
        """How strongly it is to act on a network; 0 where it has nothing for it."""
        if network not in self.networks:
            return 0.0
        return self.text_strength if network in TEXT_NETWORKS else self.scale


LoraSet = tuple[LoraFile, ...]


@dataclass(slots=True, eq=False)
class Prepared:
    """A set, ready for one network: for each weight a name for what it becomes, and how."""

    wanted: dict[Target, tuple[Name, Recipe]]

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(ITEM_BYTES + recipe.nbytes for _, recipe in self.wanted.values())


@dataclass(slots=True, eq=False)
class Planned:
    """A set, worked out for one network as far as that goes without it; the same, on the CPU."""

    wanted: dict[Target, tuple[Name, Plan]]

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(ITEM_BYTES + plan.nbytes for _, plan in self.wanted.values())


@dataclass(frozen=True, slots=True)
class Seen:
    """A weight as its network was seen: another thread may be moving that."""

    ndim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Switch:
    """What the last change of weights took."""

    seconds: float
    weights: int  # that were written


@dataclass(slots=True)
class Counts:
    """What switches there were since the start."""

    switches: int = 0
    seconds: float = 0.0  # of all of them
    hits: int = 0  # the set was ready in memory
    misses: int = 0

    def to_json(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {
            "lora_switches": self.switches,
            "lora_switch_seconds": self.seconds,
            "lora_cache_hits": self.hits,
            "lora_cache_misses": self.misses,
        }


class Adapters:
    """Switches a model's networks between LoRA sets. It belongs to one thread, but for ``preload``.

    Args:
        networks: The networks by name: ``unet``, ``text_encoder``, ``text_encoder_2``, and ``refiner`` if there is one.
        budgets: What may be kept in memory.
        read: Reads a file for a model of these names and shapes; its third argument is the field to name in errors.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], budgets: Budgets | None = None, read: Reader = read_lora
    ) -> None:
        budgets = budgets or Budgets()
        self._networks = tuple(networks)
        self._weights = Weights(networks)
        self._patched = Patched(self._weights, budgets.own_on, budgets.own)
        self._placed = partial(placed, weight=self._weights.__getitem__, most=budgets.group, devices=budgets.group_on)
        names = TargetNames(self._weights.shapes())
        self._files = ParsedFiles(lambda path, field: read(path, names, field), budgets.parsed)
        self._aside = threading.Lock()  # held by the one thread that reads ahead
        self._image_budget = budgets.prepared // IMAGE_SHARE
        self._prepared: ByteCache[object, Planned | Prepared] = ByteCache(budgets.prepared)
        self._on: dict[str, LoraSet] = dict.fromkeys(self._networks, ())  # without those an error left half changed
        self.last_switch: Switch | None = None  # for a cost model
        self.counts = Counts()

    def resolve(self, loras: Sequence[LoraRef]) -> LoraSet:
        """Look the files up as they are now and read them; a file that is replaced on disk makes another set.

        The result has one item for each of ``loras``, in order, those of strength 0 too.

        Raises:
            LoraError: There is no such file, or it is no LoRA for this model.
        """
        return self._found(loras, self._files.contents)

    @torch.inference_mode()
    def preload(
        self, loras: Sequence[LoraRef], busy: Callable[[], bool] = lambda: False, stop: Stop = lambda: False
    ) -> None:
        """Read the files of a set and work out what it makes of the weights, so that its first use finds that done.

        For any thread, while another one uses the rest of this: it looks at no weight's numbers, changes nothing and
        touches no device. What it makes is kept within the budgets, or not at all. Several threads read their files
        one after the other, but for those that are read already.

        Args:
            loras: The set, as for ``resolve``.
            busy: Whether the other thread has work that must not be held up; this one then takes longer.
            stop: Says when nobody wants it any more.

        Raises:
            LoraError: As ``resolve``; or nobody wants it any more.
        """
        with courteous(lambda: busy() and not self._files.awaited):
            found = self._found(loras, partial(self._read_aside, stop))
            for network in self._networks:
                if part := self.touching(found, network):
                    self._plan_ahead(network, part)

    def report(self, loras: LoraSet) -> tuple[LoraContents, ...]:
        """Tell what each file holds and what was left over.

        Raises:
            LoraError: A file has to be read again and is not what it was.
        """
        return tuple(self._files.contents(lora.state, lora.field) for lora in loras)

    def touching(self, loras: LoraSet, *networks: str) -> LoraSet:
        """Return the part of a set that changes any of these networks.

        Two sets with equal parts are one set to those networks: their rows may share calls of them.
        """
        return tuple(lora for lora in loras if any(lora.strength(network) != 0 for network in networks))

    @contextmanager
    def active(self, loras: LoraSet, *networks: str) -> Iterator[None]:
        """Run with exactly these LoRAs on the networks (all by default); what the others have on stays.

        The set stays on afterwards, so the same set again is free.

        Raises:
            LoraError: A file had to be read again and is not what it was, or a weight would not be finite. The
                weights are then as they were, or the model's own.
        """
        for network in networks or self._networks:
            part = self.touching(loras, network)
            if self._on.get(network) != part:
                self._switch(network, part)
        yield

    def restore(self) -> None:
        """Put the model's own weights back, bit for bit."""
        for network in self._networks:
            self._switch(network, ())

    def clear(self) -> None:
        """Restore, and let go of all memory: files, factors and own values."""
        self.restore()
        self._patched.forget_own()
        self._prepared.clear()
        self._files.clear()

    @property
    def held_bytes(self) -> dict[str, int]:
        """Bytes kept, by the names of ``Budgets``; ``own`` has those of patched weights as well."""
        return {"parsed": self._files.bytes, "prepared": self._prepared.bytes, "own": self._patched.own_bytes}

    def _read_aside(self, stop: Stop, file: FileState, field: str) -> LoraContents:
        """Read a file in turn with others that are read ahead."""
        if self._files.holds(file):
            return self._files.contents(file, field)
        with self._aside:
            if stop():
                raise LoraError(field, "is not wanted any more")
            return self._files.contents(file, field)

    def _found(self, loras: Sequence[LoraRef], contents: Callable[[FileState, str], LoraContents]) -> LoraSet:
        return tuple(self._resolved(lora, f"loras.{position}.path", contents) for position, lora in enumerate(loras))

    def _resolved(self, lora: LoraRef, field: str, contents: Callable[[FileState, str], LoraContents]) -> LoraFile:
        path = Path(lora.path)
        try:
            if not path.is_file():
                raise FileNotFoundError
            state = FileState.now(path)
        except (OSError, ValueError):  # a name that no file can have is a ValueError
            raise LoraError(field, f"was not found: {path.name[:100]!r} is not a file here") from None
        networks = frozenset(target.network for target in contents(state, field).patches)
        return LoraFile(state.path, state.modified, state.size, lora.scale, lora.text_scale, field, networks)

    @torch.inference_mode()
    def _switch(self, network: str, loras: LoraSet) -> None:
        """Put a set on one network in place of what is on it; all is read and ready before a weight changes."""
        start = time.perf_counter()
        key = (network, self._weights.device(network), loras)
        held = self._prepared.get(key)
        if loras:
            self.counts.hits += held is not None
            self.counts.misses += held is None
        known = held if isinstance(held, Prepared) else None
        prepared = known or self._prepare(held if isinstance(held, Planned) else self._planned(*key))
        self._on.pop(network, None)  # unknown, so that after an error the next call looks again
        try:
            written = self._patched.become(network, prepared.wanted)
        except FloatingPointError:
            raise LoraError(_blamed(loras), "makes weights that are not finite; lower its scale") from None
        self._on[network] = loras
        if loras and known is None:
            self._prepared.put(key, prepared, prepared.nbytes)
        elif known is not None and self._keep_images(known):
            self._prepared.put(key, known, known.nbytes)
        if written:
            _wait_for(self._weights.device(network))
            self.last_switch = Switch(time.perf_counter() - start, written)
            self.counts.switches += 1
            self.counts.seconds += self.last_switch.seconds

    def _plan_ahead(self, network: str, loras: LoraSet) -> None:
        key = (network, self._weights.device(network), loras)
        if self._prepared.get(key) is None:
            plans = self._planned(*key)
            self._prepared.put(key, plans, plans.nbytes)

    def _prepare(self, plans: Planned) -> Prepared:
        """Make plans ready for the weights, on their device."""
        made = self._placed((target, plan) for target, (_, plan) in plans.wanted.items())
        return Prepared({target: (name, made[target]) for target, (name, _) in plans.wanted.items()})

    def _planned(self, network: str, device: torch.device | None, loras: LoraSet) -> Planned:
        """Collect what each weight gets, in the request's order, and work it out for weights on that device."""
        stacks: dict[Target, list[tuple[Patch, float]]] = {}
        names: dict[Target, list[object]] = {}
        for lora in loras:
            strength = lora.strength(network)
            for target, patch in self._files.contents(lora.state, lora.field).patches.items():
                give_way()
                if target.network == network:
                    first = self._weights.first_name(target)
                    stacks.setdefault(first, []).append((patch, strength))
                    names.setdefault(first, []).append((lora.state, strength))
        wanted: dict[Target, tuple[Name, Plan]] = {}
        for target, stack in stacks.items():
            give_way()
            weight = self._weights[target]
            seen = Seen(weight.ndim, weight.dtype, device or weight.device)
            wanted[target] = (tuple(names[target]), planned(stack, seen))
        return Planned(wanted)

    def _keep_images(self, prepared: Prepared) -> bool:
        """From a set's second time on keep its patched weights themselves, where they are small enough."""
        if all(isinstance(made, Image) for _, made in prepared.wanted.values()):
            return False
        if sum(self._weights[target].nbytes for target in prepared.wanted) > self._image_budget:
            return False
        for target, (name, made) in prepared.wanted.items():
            prepared.wanted[target] = (name, self._patched.image_of(target, made))
        return True


def _wait_for(device: torch.device | None) -> None:
    """Let a GPU finish, so that what was timed was done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _blamed(loras: LoraSet) -> str:
    """The request field to name when a stack as a whole is wrong."""
    return loras[0].field if len(loras) == 1 else "loras"
