"""Which devices the worker processes of one machine run on.

Knows the settings ``device`` and ``workers`` and how to count GPUs without torch. Knows nothing of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Final

NVIDIA: Final = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU of the machine
ANY_GPU: Final = ("auto", "cuda")


def worker_devices(device: str, workers: int | None, gpus: int) -> list[str]:
    """Return the device of each worker process.

    Args:
        device: As the setting says; parts after a comma (``cuda,text=cpu``) go to every worker.
        workers: How many; ``None``: one for each GPU, or one if there is none or ``device`` names one.
        gpus: How many GPUs there are.

    Returns:
        With several GPUs and a device that names none of them, the workers take turns: ``cuda:0``, ``cuda:1``, ….
    """
    whole, *parts = device.split(",")
    if whole not in ANY_GPU or gpus < 2:
        return [device] * (1 if workers is None else workers)
    each = [",".join([f"cuda:{index}", *parts]) for index in range(gpus)]
    return list(islice(cycle(each), gpus if workers is None else workers))


def count_gpus(environment: Mapping[str, str] = os.environ, listing: Path = NVIDIA) -> int:
    """Count the GPUs that CUDA would show: those of the machine, or those that ``CUDA_VISIBLE_DEVICES`` leaves."""
    there = len(list(listing.iterdir())) if listing.is_dir() else 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    named = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    return min(there, len(named))
