"""A model's weights by name, changed in place from the model's own bits, and put back bit for bit.

Knows parameters, their own values and what was last done to each. Knows no files and no formulas: a ``Recipe`` is
something that can write a weight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from impasto.lora.keys import Target
from impasto.lora.merge import Recipe

PATCHABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
PARAMETERS: tuple[Literal["weight", "bias"], ...] = ("weight", "bias")
UNKNOWN = object()  # stands for a weight that an error may have left half written

Wanted = Mapping[Target, tuple[Hashable, Recipe]]  # what each weight is to become, and a name for that


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

        Each weight is written at most once, straight from its own value; one that is as wanted already is left alone.

        Raises:
            FloatingPointError: A weight would not be finite.
            Exception: Whatever went wrong on the way. The network's weights are then the model's own.
        """
        written = 0
        try:
            doubts = []
            for target, (name, recipe) in wanted.items():
                if self._state.get(target) != name:
                    self._write(target, name, recipe)
                    written += 1
                    if recipe.risky:
                        doubts.append(torch.isfinite(self._weights[target]).all())
            if doubts and not bool(torch.stack(doubts).all()):  # asked once: a GPU answers when all is done
                raise FloatingPointError("a weight is not finite")
            written += self._put_back(network, keep=wanted)
        except BaseException:
            self._put_back(network)
            raise
        self._trim()
        return written

    @torch.inference_mode()
    def copy_of(self, target: Target) -> Tensor:
        """Return a copy of a weight as it is now."""
        return self._weights[target].detach().clone()

    @torch.inference_mode()
    def forget_own(self) -> None:
        """Let go of own values of weights that are not patched."""
        for target in [target for target in self._own if target not in self._state]:
            del self._own[target]

    def _write(self, target: Target, name: Hashable, recipe: Recipe) -> None:
        weight = self._weights[target].detach()
        own = self._own.get(target)
        if own is None:
            own = self._own[target] = self._copied(weight)
        self._own.move_to_end(target)
        self._state[target] = UNKNOWN
        recipe.write(weight, own)
        self._state[target] = name

    def _put_back(self, network: str, keep: Wanted | None = None) -> int:
        """Copy own values back, but for those to keep."""
        going = [target for target in self._state if target.network == network and target not in (keep or {})]
        for target in going:
            self._weights[target].detach().copy_(self._own[target])
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
