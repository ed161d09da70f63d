"""Several one-thread processes that train one model: each takes a part of the batch, gradients are averaged.

On two cores this is faster than one process of two threads, for networks as narrow as these, and it suffers less
when something else takes a core for a moment. Knows gradients and processes. Does not know losses or data.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

_stop = threading.Event()


@dataclass(frozen=True)
class Team:
    """This process's place among the processes."""

    rank: int
    size: int

    def share_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its mean over the team."""
        if self.size == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def any(self, here: bool) -> bool:
        """Whether it holds in any process (so that all stop together)."""
        if self.size == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag)
        return bool(flag)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


def alone() -> Team:
    """A team of one."""
    return Team(0, 1)


def asked_to_stop() -> bool:
    """Whether this process was asked to end (SIGTERM): the loop then saves and leaves."""
    return _stop.is_set()


def heed() -> None:
    """Take SIGTERM as the wish to end, in this process."""
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())


def member(rank: int, size: int, meeting: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One process: meet the others, then work on one thread."""
    torch.set_num_threads(1)
    heed()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        work(Team(rank, size), *arguments)
    finally:
        dist.destroy_process_group()


def together(size: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Run ``work(team, *arguments)`` in as many processes; an error in one ends all."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        team: Any = spawn(member, (size, meeting, work, arguments), size, join=False)  # type: ignore[no-untyped-call]
        signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in team.processes])
        while not team.join():
            pass
