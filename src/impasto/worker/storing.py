"""Finished media on their way into files, one after the other on a thread of their own, while the next steps run.

Knows the gate, encoding and the publisher. Knows no backend and no queue: what came of each is asked for by the loop,
on the loop's thread, and only there a job's state changes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from impasto.jobs.records import Output
from impasto.safety.gate import SafetyGate
from impasto.types import Finished, ImageReady, VideoReady
from impasto.worker.media import media_file
from impasto.worker.publishing import Publisher
from impasto.worker.running import Running
from impasto.worker.stats import WorkerStats


@dataclass(frozen=True, slots=True)
class Stored:
    """What came of one picture or video."""

    running: Running
    index: int  # position among the request's images
    output: Output | None  # ``None``: it could not be stored
    error: Exception | None  # why


class Storing:
    """Checks, encodes and stores.

    Args:
        publisher: Where files go.
        safety: What pictures must pass.
        stats: Counts what was stored.
    """

    def __init__(self, publisher: Publisher, safety: SafetyGate, stats: WorkerStats) -> None:
        self._publisher = publisher
        self._safety = safety
        self._stats = stats
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="storing")
        self._under_way: list[tuple[Running, int, Future[Output]]] = []
        self._finished: list[tuple[Running, Finished]] = []  # in the backend; some of their files may be missing

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._under_way or self._finished)

    def begin(self, running: Running, event: ImageReady | VideoReady) -> None:
        """Take a finished picture or video in."""
        self._under_way.append((running, event.index, self._pool.submit(self._store, running, event)))

    def finish(self, running: Running, event: Finished) -> None:
        """Note that nothing more will come of a job."""
        self._finished.append((running, event))

    def stored(self, patience: float = 0.0) -> list[Stored]:
        """Return what was stored, or could not be, since the last call; wait up to ``patience`` seconds for all.

        In the order in which it was begun.
        """
        if patience and self._under_way:
            wait([future for *_, future in self._under_way], patience)
        done = [item for item in self._under_way if item[2].done()]
        self._under_way = [item for item in self._under_way if item not in done]
        return [_outcome(*item) for item in done]

    def complete(self) -> list[tuple[Running, Sequence[Any]]]:
        """Return, once each, the jobs that are finished and have nothing more on its way, with their LoRAs' reports."""
        open_jobs = {id(running) for running, *_ in self._under_way}
        ready = [item for item in self._finished if id(item[0]) not in open_jobs]
        self._finished = [item for item in self._finished if item not in ready]
        return [(running, event.reports) for running, event in ready]

    def stop(self, seconds: float) -> list[Stored]:
        """Begin nothing more, wait for what is being written, and return what came of it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        pending = [future for *_, future in self._under_way if not future.cancelled()]
        wait(pending, seconds)
        return [stored for stored in self.stored() if stored.output is not None]

    def _store(self, running: Running, event: ImageReady | VideoReady) -> Output:
        start = time.monotonic()
        made = media_file(event, running, self._safety)
        blob = self._publisher.picture(running.lease, event.index, made.data, made.content_type)
        width, height = made.size
        self._stats.stored(time.monotonic() - start)
        return Output(blob, made.content_type, width, height, nsfw=made.nsfw, seed=event.seed, made=running.made)


def _outcome(running: Running, index: int, future: Future[Output]) -> Stored:
    if future.cancelled():
        return Stored(running, index, None, None)
    error = future.exception()
    if error is None:
        return Stored(running, index, future.result(), None)
    return Stored(running, index, None, error if isinstance(error, Exception) else RuntimeError(repr(error)))
