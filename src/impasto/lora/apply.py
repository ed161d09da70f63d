"""Putting LoRAs onto a model's weights and taking them off again, bit for bit.

Knows networks and patches. Knows no requests or steps. A set that is already on costs nothing; another set starts
from pristine copies, so no error ever accumulates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from impasto.errors import LoraError
from impasto.lora.formats import Patches, read_lora
from impasto.lora.keys import Target, TargetNames
from impasto.lora.patch import LowRank
from impasto.types import LoraRef

PARSED_FILES = 16  # files whose patches are kept in memory


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file as it was when a request asked for it, and how strongly to apply it."""

    path: Path
    modified: int  # nanoseconds since 1970
    size: int  # bytes
    scale: float
    field: str  # the request field that named it, for errors


LoraSet = tuple[LoraFile, ...]


class Adapters:
    """Switches a model's networks between LoRA sets.

    Args:
        networks: The networks by diffusers' names (``unet``, ``text_encoder``, ``text_encoder_2``).
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._modules = {
            Target(network, name): module
            for network, root in networks.items()
            for name, module in root.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        names: dict[str, list[str]] = {network: [] for network in networks}
        for target in self._modules:
            names[target.network].append(target.module)
        self._names = TargetNames(names)
        self._parsed: OrderedDict[tuple[Path, int, int], Patches] = OrderedDict()
        self._pristine: dict[Target, Tensor] = {}
        self._on: LoraSet | None = ()  # None while weights are being changed

    def resolve(self, loras: Sequence[LoraRef]) -> LoraSet:
        """Look the files up as they are now. A file that is replaced on disk makes another set.

        Raises:
            LoraError: There is no such file.
        """
        found = []
        for position, lora in enumerate(loras):
            field = f"loras.{position}.path"
            path = Path(lora.path)
            if not path.is_file():
                raise LoraError(field, f"was not found: {path.name!r} is not a file here")
            stat = path.stat()
            if lora.scale != 0:
                found.append(LoraFile(path.resolve(), stat.st_mtime_ns, stat.st_size, lora.scale, field))
        return tuple(found)

    @contextmanager
    def active(self, loras: LoraSet) -> Iterator[None]:
        """Run with exactly these LoRAs on the weights. They stay on afterwards, so the same set again is free.

        Raises:
            LoraError: A file cannot be read or does not fit; the weights are then the model's own.
        """
        if loras != self._on:
            self.restore()
            self._put_on(loras)
        yield

    @torch.no_grad()
    def restore(self) -> None:
        """Put the model's own weights back, bit for bit."""
        self._on = None
        for target, weight in self._pristine.items():
            self._weight(target).copy_(weight)
        self._pristine.clear()
        self._on = ()

    @torch.no_grad()
    def _put_on(self, loras: LoraSet) -> None:
        patches = self._by_target(loras)
        self._on = None
        try:
            for target, stack in patches.items():
                weight = self._weight(target)
                self._pristine[target] = weight.clone()
                total = weight.float()
                for patch, scale in stack:
                    total = total + scale * patch.delta(weight.shape).to(weight.device)
                weight.copy_(total)  # rounded once, at the end
        except BaseException:
            self.restore()
            raise
        self._on = loras

    def _by_target(self, loras: LoraSet) -> dict[Target, list[tuple[LowRank, float]]]:
        """Collect what each weight gets, in the request's order; all is checked before any weight changes."""
        stacks: dict[Target, list[tuple[LowRank, float]]] = {}
        for lora in loras:
            for target, patch in self._read(lora).items():
                shape = self._weight(target).shape
                if not patch.fits(shape):
                    raise LoraError(lora.field, f"does not fit this model: {target.module} is {tuple(shape)}")
                stacks.setdefault(target, []).append((patch, lora.scale))
        return stacks

    def _weight(self, target: Target) -> Tensor:
        return self._modules[target].weight

    def _read(self, lora: LoraFile) -> Patches:
        """Parse a file, or take it from memory."""
        key = (lora.path, lora.modified, lora.size)
        if key not in self._parsed:
            self._parsed[key] = read_lora(lora.path, self._names, lora.field)
            while len(self._parsed) > PARSED_FILES:
                self._parsed.popitem(last=False)
        self._parsed.move_to_end(key)
        return self._parsed[key]
