"""Puts files of the generator on the networks through the library's own door and compares every parameter."""

from collections.abc import Sequence

import torch

from impasto.lora.apply import Adapters
from impasto.lora.contents import LoraContents
from impasto.lora.keys import Target
from impasto.types import LoraRef
from tests.parity.lora.files import LoraCase
from tests.parity.lora.networks import Networks

RELATIVE = 1e-5  # largest error of a parameter's change, of that change's largest number
FLOAT32 = 2.0**-23
ROOM = 4  # roundings of float32 that a change may show: it is the difference of two weights

Own = dict[Target, torch.Tensor]


class Checker:
    """One model, and its own weights in float64.

    Args:
        networks: The model.
    """

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self._adapters = Adapters(networks.modules)
        self._own = {
            Target(network, module, parameter): value.detach().clone()
            for network, root in networks.modules.items()
            for module, part in root.named_modules()
            for parameter in ("weight", "bias")
            if isinstance(value := getattr(part, parameter, None), torch.Tensor)
        }

    def error(self, cases: Sequence[LoraCase], strengths: Sequence[float], others: bool = True) -> float:
        """Put the cases on in order; return the worst error of a changed parameter, relative to its change.

        A parameter that no case changes must be the model's own, bit for bit, or the error is infinite; ``others``
        says whether to look.
        """
        wanted = self._wanted(cases, strengths)
        refs = [LoraRef(str(case.path), strength) for case, strength in zip(cases, strengths, strict=True)]
        with self._adapters.active(self._adapters.resolve(refs)):
            looked_at = self._own if others else wanted
            return max((self._error_of(target, wanted.get(target)) for target in looked_at), default=0.0)

    def contents(self, case: LoraCase) -> LoraContents:
        """What the library reports of a file."""
        return self._adapters.report(self._adapters.resolve([LoraRef(str(case.path))]))[0]

    def forget(self) -> None:
        """Put the model's own weights back and let go of the files."""
        self._adapters.clear()

    def _wanted(self, cases: Sequence[LoraCase], strengths: Sequence[float]) -> Own:
        """Every changed parameter by the formulas: one file after another, each on what the earlier ones left."""
        wanted: Own = {}
        for case, strength in zip(cases, strengths, strict=True):
            for target, formula in case.wanted.items():
                before = wanted.get(target, self._own[target].double())
                wanted[target] = formula(before, strength)
        return wanted

    def _error_of(self, target: Target, wanted: torch.Tensor | None) -> float:
        own, now = self._own[target], self.networks.parameter(target)
        if wanted is None:
            return 0.0 if torch.equal(own, now) else float("inf")
        change, found = wanted - own.double(), now.double() - own.double()
        error = (found - change).abs().max().item()
        size = change.abs().max().item()
        if size == 0:
            return 0.0 if error == 0 else float("inf")
        # A change far smaller than its weight cannot be stored better than float32 stores the weight.
        stored = ROOM * FLOAT32 * wanted.abs().max().item()
        return max(error - stored, 0.0) / size if error / size > RELATIVE else error / size
