"""How many rows share a network call: measured memory, not guessed.

Knows how a device's memory is read, and the arithmetic of limits. Knows no networks, rows or pictures. ``BatchLimits``
is plain arithmetic over whatever gauge it is given; ``MemoryGauge`` is the real one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

SHARE = 0.9  # of the free memory that a call may plan with
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Gauge(Protocol):
    """Tells how much memory a call could take now."""

    def free(self) -> int | None:
        """Bytes, or ``None`` where it cannot be known."""


@dataclass(slots=True)
class _Learnt:
    """What is known of one kind of call."""

    rows: int  # of the largest call measured
    bytes_per_row: float | None  # the most seen at that size; None: could not be measured


class BatchLimits:
    """Most rows of a call, by its key (stage and latent shape).

    A kind of call starts with one row. Once measured it may have as many as fit into 0.9 of the free memory, at the
    bytes a row of the largest measured call took; after an out-of-memory error half as many, for good. A row is
    whatever the caller counts, in ``limit``, ``learn`` and ``most`` alike.

    Args:
        gauge: Tells the free memory.
        most: Rows that are never exceeded, at least 1.
    """

    def __init__(self, gauge: Gauge, most: int) -> None:
        if most < 1:
            raise ValueError("most must be at least 1")
        self._gauge = gauge
        self._most = most
        self._learnt: dict[Hashable, _Learnt] = {}
        self._caps: dict[Hashable, int] = {}

    def limit(self, key: Hashable) -> int:
        """Rows the next call of this kind may have, from 1 to ``most``."""
        known = self._learnt.get(key)
        if known is None:
            return 1
        return max(1, min(self._most, self._caps.get(key, self._most), self._fitting(known)))

    def learn(self, key: Hashable, rows: int, peak_bytes: int | None) -> None:
        """Note that a call of ``rows`` rows took ``peak_bytes`` above its start (``None``: not measurable here)."""
        if rows < 1 or (peak_bytes is not None and peak_bytes < 0):
            raise ValueError(f"a call of {rows} rows and {peak_bytes} bytes cannot be")
        per_row = None if peak_bytes is None else peak_bytes / rows
        known = self._learnt.get(key)
        if known is None or rows > known.rows or known.bytes_per_row is None:
            self._learnt[key] = _Learnt(rows, per_row)
        elif rows == known.rows and per_row is not None:
            known.bytes_per_row = max(per_row, known.bytes_per_row)

    def halve(self, key: Hashable, rows: int | None = None) -> None:
        """Allow half of ``rows`` (by default of the limit) from now on: a call ran out of memory."""
        self._caps[key] = max(1, min(rows or self.limit(key), self.limit(key)) // 2)

    def _fitting(self, known: _Learnt) -> int:
        free = self._gauge.free()
        if free is None or not known.bytes_per_row:
            return self._most
        return math.floor(SHARE * free / known.bytes_per_row)


@dataclass(slots=True)
class Peak:
    """What one measured call took; filled in when it ends."""

    bytes: int | None = None  # above what was held at its start; None: cannot be measured here


class MemoryGauge:
    """Reads the memory of a device: CUDA's allocator, or this process under Linux.

    Args:
        device: Where the networks run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextmanager
    def measure(self) -> Iterator[Peak]:
        """Measure the most memory the block takes above its start.

        On a CPU other threads of the process count as well, and memory that was freed before but never given back to
        the system does not: the figure is a good estimate, not a bound.
        """
        peak = Peak()
        cuda = self._device.type == "cuda"
        start = self._start_cuda() if cuda else self._start_cpu()
        yield peak
        if start is not None:
            high = torch.cuda.max_memory_allocated(self._device) if cuda else process_memory("VmHWM")
            peak.bytes = None if high is None else max(0, high - start)

    def free(self) -> int | None:
        """Bytes a call could take now, what the allocator keeps cached included; ``None`` where unknown."""
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return int(free + kept)
        return free_memory() if self._device.type == "cpu" else None

    def _start_cuda(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _start_cpu(self) -> int | None:
        """Set the process's high-water mark back (proc_pid_clear_refs(5): value 5) and return what it holds."""
        if self._device.type != "cpu":
            return None
        try:
            (PROC / "self/clear_refs").write_text("5")
        except OSError:
            return None
        return process_memory("VmRSS")


def allocated(device: torch.device) -> dict[str, float]:
    """Bytes that tensors take on a device and that its allocator holds, by name; empty where it cannot tell."""
    if device.type != "cuda":
        return {}
    held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return {"device_bytes": float(held), "device_reserved_bytes": float(reserved)}


def process_memory(name: str, proc: Path = PROC) -> int | None:
    """A figure of this process in bytes: ``VmRSS`` (held now) or ``VmHWM`` (held at most); see proc_pid_status(5)."""
    return _kilobytes(proc / "self/status", name)


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that this machine, or this process's control group if that is less, could still give.

    Source: proc_meminfo(5), and the kernel's documents on control groups, version 1 and 2. File pages that a group
    holds but could drop count as free, as they do in ``MemAvailable``.
    """
    available = _kilobytes(proc / "meminfo", "MemAvailable")
    bounds = [available, *_group_bounds(proc, cgroups)]
    return min((bound for bound in bounds if bound is not None), default=None)


def _group_bounds(proc: Path, cgroups: Path) -> Iterator[int | None]:
    """What each group that holds this process, from its own up to the root, could still give."""
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _chain(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _chain(cgroups / "memory", path, *names)


def _chain(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int | None]:
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        yield _room(folder, limit, usage, reclaimable)
        if folder == root:
            return


def _room(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit less usage of one group; ``None`` without a limit."""
    most, used = (next(iter(_lines(folder / name)), "") for name in (limit, usage))
    if not (most.isdigit() and used.isdigit()):  # "max", or no such file at this level
        return None
    stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    return max(0, int(most) - int(used) + int(stat.get(reclaimable, 0)))


def _kilobytes(file: Path, name: str) -> int | None:
    found = (line.split()[1] for line in _lines(file) if line.startswith(f"{name}:"))
    value = next(found, None)
    return None if value is None else int(value) * 1024


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
