"""A diffusers server that takes requests one at a time, loading each one's LoRAs and unloading them afterwards.

Knows diffusers' pipeline and a queue. Knows nothing of ours but the request's fields. It is what the documents of
diffusers show, with the obvious kindnesses: the pipeline stays loaded, a request with the LoRAs that are on already
keeps them, and nothing is checked, encoded or stored.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ways import Diffusers
from impasto.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class Done:
    """When a request began to be worked on, and when its picture was there (``time.perf_counter()``)."""

    began: float
    ended: float


class OneByOne:
    """First come, first served.

    Args:
        way: The pipeline.
    """

    def __init__(self, way: Diffusers) -> None:
        self._way = way
        self._queue: queue.Queue[tuple[int, GenerationRequest, tuple[Path, ...]] | None] = queue.Queue()
        self._on: tuple[Path, ...] = ()
        self.done: dict[int, Done] = {}
        self._thread = threading.Thread(target=self._work, name="one-by-one")
        self._thread.start()

    def submit(self, number: int, request: GenerationRequest, loras: tuple[Path, ...]) -> None:
        """Take a request in."""
        self._queue.put((number, request, loras))

    def close(self) -> None:
        """Finish what is here, and end."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            number, request, loras = item
            began = time.perf_counter()
            if loras != self._on:
                self._way.wear(loras)
                self._on = loras
            self._way.draw(request)
            self.done[number] = Done(began, time.perf_counter())
        self._way.wear(())
