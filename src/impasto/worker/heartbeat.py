"""A worker's heartbeat: keeps its leases, carries progress and previews out, brings cancellations in.

Knows the store and a clock; runs on a thread of its own, because a step may take longer than a lease. Knows nothing of
how jobs are run. While nothing happens it beats once a second; news go out sooner, up to four times a second on a
store that answers at once, and less often on a slow one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from impasto.errors import Unavailable
from impasto.jobs.records import Lease
from impasto.jobs.store import JobStore
from impasto.jobs.workers import REPORT_SECONDS, WorkerReport, WorkerReports
from impasto.worker.running import Running
from impasto.worker.stats import WorkerStats

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0  # between heartbeats without news
NEWS_SECONDS = 0.25  # between heartbeats with news, at least
PAUSE_PER_BEAT = 5  # times as long as the last one took: the store is not kept busy with one worker's news
BEATS_PER_LEASE = 4  # at least
STALL_LEASES = 20  # a backend that has not moved for this many leases will not


class Heartbeat:
    """Tells the store of a worker's jobs until it is stopped.

    Args:
        store: The job store.
        name: The worker.
        held: The jobs it has now; called from the heartbeat's thread.
        stats: Its counters.
        lease_seconds: Silence after which the store gives this worker's jobs away.
        max_attempts: Times a job is started before the store gives it up.
        on_stall: Called when the worker has not moved for ``STALL_LEASES`` leases; there are no more beats then.
        reports: Where the worker says that it is there, and what it counted; nowhere by default.
        device: Where it runs, for its report.
    """

    def __init__(
        self,
        store: JobStore,
        name: str,
        held: Callable[[], Sequence[Running]],
        stats: WorkerStats,
        *,
        lease_seconds: float,
        max_attempts: int,
        on_stall: Callable[[], object],
        reports: WorkerReports | None = None,
        device: str = "",
    ) -> None:
        self._store = store
        self._name = name
        self._held = held
        self._stats = stats
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._on_stall = on_stall
        self._reports = reports
        self._device = device
        self._pause = min(BEAT_SECONDS, lease_seconds / BEATS_PER_LEASE)
        self._lock = threading.Lock()  # guards _ended
        self._ended: dict[Lease, str] = {}
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._moved = time.monotonic()
        self._reaped = self._reported = -float("inf")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """End, and say that the worker is gone."""
        self._stopping.set()
        self._news.set()
        self._thread.join(timeout=5)
        if self._reports is not None:
            try:
                self._reports.remove(self._name)
            except Unavailable as error:  # it will be forgotten
                log.warning("the worker could not be signed off: %s", error)

    def moved(self) -> None:
        """Note that the worker is not stuck."""
        self._moved = time.monotonic()

    def tell(self) -> None:
        """There is something new about some job: beat soon."""
        self._news.set()

    def take_ended(self) -> dict[Lease, str]:
        """Return the leases that ended elsewhere since the last call: ``cancelled`` by their owner, or ``lost``."""
        with self._lock:
            ended, self._ended = self._ended, {}
        return ended

    def beat(self) -> None:
        """Beat once, now.

        Raises:
            Unavailable: The store does not answer.
        """
        now = time.monotonic()
        news = {running.lease: running.news() for running in self._held()}
        previews = {lease: preview for lease, (_, preview) in news.items() if preview is not None}
        progress = {lease: how_far for lease, (how_far, _) in news.items()}
        beat = self._store.heartbeat(self._name, progress, self._lease_seconds, previews)
        with self._lock:
            self._ended |= dict.fromkeys(beat.lost, "lost") | dict.fromkeys(beat.cancelled, "cancelled")
        if now >= self._reaped + self._pause:
            self._reaped = now
            self._stats.reaped(len(self._store.reap(self._max_attempts)))
        if now >= self._reported + REPORT_SECONDS:
            self._reported = now
            self._report()

    def _report(self) -> None:
        if self._reports is not None:
            host = self._name.rsplit("-", 1)[0]
            self._reports.report(WorkerReport(self._name, host, self._device, "default", self._stats.snapshot()))

    def _run(self) -> None:
        gap, last = 0.0, time.monotonic()
        while True:
            self._news.wait(self._pause)
            if self._stopping.wait(max(0.0, last + gap - time.monotonic())):
                return
            self._news.clear()
            if time.monotonic() - self._moved > STALL_LEASES * self._lease_seconds:
                log.error("the backend has not moved for %d leases", STALL_LEASES)
                self._on_stall()
                return
            start = time.monotonic()
            try:
                self.beat()
            except Exception:  # the database may be away for a moment: keep trying inside the lease
                log.exception("heartbeat failed")
            last = time.monotonic()
            gap = min(self._pause, max(NEWS_SECONDS, PAUSE_PER_BEAT * (last - start)))
