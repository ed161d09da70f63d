"""Which networks are on the device: all of them, or only those at work.

Knows modules and devices. Knows nothing of what the networks do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal

import torch
from torch import nn

Role = Literal["text", "unet", "vae"]
Offload = Literal["none", "encoders", "all"]

HOME = torch.device("cpu")  # where networks wait
ROAMING: Final[dict[Offload, tuple[Role, ...]]] = {"none": (), "encoders": ("text",), "all": ("text", "unet", "vae")}


class Residence:
    """Brings networks to the device for as long as they are needed.

    Args:
        devices: Where each role's networks run.
        offload: ``none`` keeps all there; ``encoders`` brings the text encoders for each new prompt and sends them
            back; ``all`` keeps one network there at a time, so that the largest alone must fit.
    """

    def __init__(self, devices: Mapping[Role, torch.device], offload: Offload = "none") -> None:
        self._devices = devices
        self._roles = ROAMING[offload]
        self._here: tuple[nn.Module, ...] = ()  # of those that come and go

    def settle(self, role: Role, *networks: nn.Module) -> None:
        """Put networks where they stay while nobody uses them."""
        for network in networks:
            network.to(HOME if role in self._roles else self._devices[role])

    @contextmanager
    def using(self, role: Role, *networks: nn.Module) -> Iterator[None]:
        """Have networks on the device; whichever came before goes home first."""
        if role not in self._roles:
            yield
            return
        if self._here != networks:
            self.clear()
            self._here = networks
            for network in networks:
                network.to(self._devices[role])
        try:
            yield
        finally:
            if role == "text":  # used once a prompt; what comes next wants the room
                self.clear()

    def clear(self) -> None:
        """Send home whatever came."""
        for network in self._here:
            network.to(HOME)
        self._here = ()
