"""Putting LoRAs onto a model's weights and taking them off again, bit for bit.

Knows networks and patches. Knows no requests or steps. A set that is already on costs nothing; another set starts
from pristine copies, so no error ever accumulates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from impasto.errors import LoraError
from impasto.lora.formats import Patches, read_lora
from impasto.lora.keys import Target, TargetNames
from impasto.types import LoraRef

PARSED_FILES = 16  # files whose patches are kept in memory


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
        self._parsed: OrderedDict[tuple[str, int, int], Patches] = OrderedDict()
        self._pristine: dict[Target, Tensor] = {}
        self._on: tuple[LoraRef, ...] = ()

    @contextmanager
    def active(self, loras: Sequence[LoraRef]) -> Iterator[None]:
        """Run with exactly these LoRAs on the weights. They stay on afterwards, so the same set again is free.

        Raises:
            LoraError: A file cannot be read or does not fit; the weights are then the model's own.
        """
        wanted = tuple(lora for lora in loras if lora.scale != 0)
        if wanted != self._on:
            self.restore()
            self._put_on(wanted)
        yield

    @torch.no_grad()
    def restore(self) -> None:
        """Put the model's own weights back, bit for bit."""
        for target, weight in self._pristine.items():
            self._weight(target).copy_(weight)
        self._pristine.clear()
        self._on = ()

    @torch.no_grad()
    def _put_on(self, loras: tuple[LoraRef, ...]) -> None:
        deltas: dict[Target, Tensor] = {}
        for position, lora in enumerate(loras):
            field = f"loras.{position}.path"
            for target, patch in self._read(lora.path, field).items():
                weight = self._weight(target)
                if not patch.fits(weight.shape):
                    raise LoraError(field, f"does not fit this model: {target.module} is {tuple(weight.shape)}")
                delta = lora.scale * patch.delta(weight.shape)
                deltas[target] = deltas[target] + delta if target in deltas else delta
        for target, delta in deltas.items():
            weight = self._weight(target)
            self._pristine[target] = weight.clone()
            weight.copy_(weight.float() + delta.to(weight.device))  # rounded once, at the end
        self._on = loras

    def _weight(self, target: Target) -> Tensor:
        return self._modules[target].weight

    def _read(self, path: str, field: str) -> Patches:
        """Parse a file, or take it from memory if it has not changed on disk."""
        file = Path(path)
        if not file.is_file():
            raise LoraError(field, f"was not found: {path!r} is not a file here")
        stat = file.stat()
        key = (str(file.resolve()), stat.st_mtime_ns, stat.st_size)
        if key not in self._parsed:
            self._parsed[key] = read_lora(file, self._names, field)
            while len(self._parsed) > PARSED_FILES:
                self._parsed.popitem(last=False)
        self._parsed.move_to_end(key)
        return self._parsed[key]
