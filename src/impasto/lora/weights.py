"""A model's weights by name, changed in place from the model's own bits, and put back bit for bit.

Knows parameters, their own values and what was last done to each. Knows no files and no formulas: a ``Recipe`` is
something that can write a weight, a ``Batch`` something that can write several.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from impasto.lora.grouped import Batch, batches
from impasto.lora.keys import Target
from impasto.lora.merge import Image, Recipe

PATCHABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
PARAMETERS: tuple[Literal["weight", "bias"], ...] = ("weight", "bias")
UNKNOWN = object()  # stands for a weight that an error may have left half written

Wanted = Mapping[Target, tuple[Hashable, Recipe]]  # what each weight is to become, and a name for that


class Follower(Protocol):
    """A layer that multiplies by something else than its weight, and has to be told when that is changed."""

    def wear_product(self, own: Tensor, up: Tensor, down: Tensor, alpha: float) -> None:
        """The weight is now ``own + alpha * up @ down``."""

    def wear_weight(self) -> None:
        """The weight was changed in another way."""

    def wear_nothing(self) -> None:
        """The weight is the model's own."""


class Weights:
    """The parameters that LoRAs may change: weights and biases of linears, convolutions and norms.

    A parameter that several modules share is one weight under several names.

    Args:
        networks: The networks by name.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._modules: dict[Target, nn.Module] = {}
        self._first: dict[Target, Target] = {}
        first_names: dict[Hashable, Target] = {}
        for target, module, weight in _parameters(networks):
            first = first_names.setdefault(_memory(weight), target)
            if first.network == target.network:  # what two networks share is the first one's
                self._modules[target] = module
                self._first[target] = first

    def shapes(self) -> dict[Target, torch.Size]:
        """Shape of every weight, under all its names."""
        return {target: self[target].shape for target in self._modules}

    def first_name(self, target: Target) -> Target:
        """Return the one name that stands for a weight: equal for all names of a shared one."""
        return self._first[target]

    def device(self, network: str) -> torch.device | None:
        """Return where a network is now; ``None`` for one without weights."""
        return next((self[target].device for target in self._modules if target.network == network), None)

    def follower(self, target: Target) -> Follower | None:
        """Return the layer, if it wants to be told of changes of this weight."""
        module = self._modules[target]
        if target.parameter != "weight" or not hasattr(type(module), "wear_product"):
            return None
        return cast(Follower, module)

    def __getitem__(self, target: Target) -> Tensor:
        """Return the parameter as it is now; moving a network between devices gives it another memory."""
        weight: Tensor = getattr(self._modules[target], target.parameter)
        return weight


def _parameters(networks: Mapping[str, nn.Module]) -> Iterator[tuple[Target, nn.Module, Tensor]]:
    for network, root in networks.items():
        for name, module in root.named_modules(remove_duplicate=False):
            if isinstance(module, PATCHABLE):
                for parameter in PARAMETERS:
                    weight = getattr(module, parameter, None)
                    if weight is not None:
                        yield Target(network, name, parameter), module, weight


def _memory(weight: Tensor) -> Hashable:
    """What two tensors have alike if they are one."""
    place = weight.data_ptr()
    return (weight.device, place, weight.shape, weight.stride()) if place else id(weight)


class Patched:
    """Which weights are patched, with what, and the model's own values of all that ever were.

    Args:
        weights: The parameters.
        keep_on: Where own values are kept; ``None``: beside their weight.
        budget: Bytes of own values kept of weights that are not patched now, so that patching them again saves a
            copy; ``None``: no bound but the model's size.
    """

    def __init__(self, weights: Weights, keep_on: torch.device | None = None, budget: int | None = None) -> None:
        self._weights = weights
        self._keep_on = keep_on
        self._budget = budget
        self._own: OrderedDict[Target, Tensor] = OrderedDict()  # used longest ago first
        self._state: dict[Target, Hashable] = {}  # of the weights that are not the model's own

    @property
    def own_bytes(self) -> int:
        """Bytes of own values held."""
        return sum(own.nbytes for own in self._own.values())

    @torch.inference_mode()
    def become(self, network: str, wanted: Wanted) -> int:
        """Make a network's weights what is wanted, and all its others the model's own; return how many were written.

        Each weight is written at most once, straight from its own value; one that is as wanted already is left alone,
        unless it is one of a group of which another is not.

        Raises:
            FloatingPointError: A weight would not be finite.
            Exception: Whatever went wrong on the way. The network's weights are then the model's own.
        """
        state = self._state
        todo = {target: made for target, (name, made) in wanted.items() if state.get(target) != (name, made.layout)}
        written = 0
        try:
            doubts = []
            for batch in batches(todo):
                finite = self._write(batch, wanted)
                written += len(batch.targets)
                if finite is not None:
                    doubts.append(finite)
            if doubts and not bool(torch.stack(doubts).all()):  # asked once: a GPU answers when all is done
                raise FloatingPointError("a weight is not finite")
            written += self._put_back(network, keep=wanted)
        except BaseException:
            self._put_back(network)
            raise
        self._trim()
        return written

    @torch.inference_mode()
    def image_of(self, target: Target, made: Recipe) -> Image:
        """Return a copy of a weight as it is now, which ``made`` has made."""
        low_rank = made.low_rank if self._weights.follower(target) else None
        return Image(self._weights[target].detach().clone(), made.layout, low_rank)

    @torch.inference_mode()
    def forget_own(self) -> None:
        """Let go of own values of weights that are not patched."""
        for target in [target for target in self._own if target not in self._state]:
            del self._own[target]

    def _write(self, batch: Batch, wanted: Wanted) -> Tensor | None:
        weights, owns = [], []
        for target in batch.targets:
            weight = self._weights[target].detach()
            weights.append(weight)
            owns.append(self._own_of(target, weight))
        for target in batch.targets:
            self._state[target] = UNKNOWN
        finite = batch.write(weights, owns)
        for target in batch.targets:
            name, made = wanted[target]
            self._tell(target, made)
            self._state[target] = name, made.layout
        return finite

    def _tell(self, target: Target, made: Recipe | None) -> None:
        follower = self._weights.follower(target)
        if follower is None:
            return
        if made is None:
            follower.wear_nothing()
        elif made.low_rank is None:
            follower.wear_weight()
        else:
            follower.wear_product(self._own[target], *made.low_rank)

    def _own_of(self, target: Target, weight: Tensor) -> Tensor:
        """Return a weight's own value, which counts as used; from the weight itself if it was never patched."""
        own = self._own.get(target)
        if own is None:
            own = self._own[target] = self._copied(weight)
        self._own.move_to_end(target)
        return own

    def _put_back(self, network: str, keep: Wanted | None = None) -> int:
        """Copy own values back, but for those to keep: in one go for those of one format."""
        going = [target for target in self._state if target.network == network and target not in (keep or {})]
        alike: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
        for target in going:
            weight, own = self._weights[target].detach(), self._own[target]
            weights, owns = alike.setdefault((weight.dtype, weight.device, own.device), ([], []))
            weights.append(weight)
            owns.append(own)
        for weights, owns in alike.values():
            torch._foreach_copy_(weights, owns, non_blocking=weights[0].device.type == "cuda")
        for target in going:
            self._tell(target, None)
            del self._state[target]
        return len(going)

    def _copied(self, weight: Tensor) -> Tensor:
        if self._keep_on is None or self._keep_on == weight.device:
            return weight.clone()
        copy = weight.to(self._keep_on)
        return copy.pin_memory() if weight.device.type == "cuda" and copy.device.type == "cpu" else copy

    def _trim(self) -> None:
        if self._budget is None:
            return
        idle = [target for target in self._own if target not in self._state]
        held = sum(self._own[target].nbytes for target in idle)
        for target in idle:
            if held <= self._budget:
                return
            held -= self._own.pop(target).nbytes
