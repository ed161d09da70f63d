"""The worker's loop: claim jobs, move them step by step, store pictures, finish.

Knows the store, the output files and a backend. Knows no HTTP, and no torch: the backend is handed in.

Every write names the lease it was done under, so a worker that lost a job (it hung, the machine slept) can not
publish anything for it. Progress and previews travel with the heartbeat, which also brings back cancellations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from impasto.errors import ImpastoError, Unavailable
from impasto.jobs.events import ChangeWatcher
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Job, Lease
from impasto.jobs.store import JobStore
from impasto.jobs.workers import WorkerReports
from impasto.safety.gate import SafetyGate
from impasto.types import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ImageReady,
    Preview,
    Progress,
    VideoReady,
)
from impasto.worker.backend import Backend
from impasto.worker.heartbeat import Heartbeat
from impasto.worker.intake import Intake
from impasto.worker.loras import LoraLibrary
from impasto.worker.previews import preview_every
from impasto.worker.provenance import Provenance
from impasto.worker.publishing import Publisher
from impasto.worker.running import Running
from impasto.worker.stats import WorkerStats
from impasto.worker.storing import Stored, Storing

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # longest sleep without a look at the queue, should a wake-up be lost
FETCHES = 16  # most jobs that wait for their files; they take no slot
FETCH_WAIT_SECONDS = 0.1  # for files to come or be stored, while there is nothing else to do
STORAGE = "storage"  # error class of a job whose files could not be had
STORE_SHARE = 0.1  # of a step's time: where steps take minutes, a picture need not wait for the next to end
STOP_SECONDS = 5.0  # for pictures that are being stored when the worker is told to go
NOTE_SECONDS = 1.0  # between looks at what the backend says of itself


class WorkerLoop:
    """Runs jobs until told to stop.

    Args:
        store: The job store.
        outputs: Where pictures go.
        backend: What makes them.
        name: This worker, unique among all workers.
        lora_dir: Folder whose ``.safetensors`` files requests may name.
        slots: Most jobs in the backend at once.
        lease_seconds: Silence after which the store gives this worker's jobs away.
        max_attempts: Times a job is started before the store gives it up.
        on_stall: Called, from another thread, when the backend has not moved for many leases.
        loras: Finds the LoRAs that requests name; by default in ``lora_dir`` alone.
        previews: Whether to show what running jobs' pictures are becoming.
        reports: Where to say that this worker is there, and what it counted; nowhere by default.
        safety: What pictures and prompts must pass; by default nothing.
        provenance: What pictures and predictions tell of how they were made; by default nothing.
        drain_seconds: How long jobs may go on after ``stop``; what is not done then goes back to the queue.
    """

    def __init__(
        self,
        store: JobStore,
        outputs: OutputStore,
        backend: Backend,
        *,
        name: str,
        lora_dir: Path,
        slots: int = 4,
        lease_seconds: float = 30.0,
        max_attempts: int = 3,
        on_stall: Callable[[], object] = lambda: None,
        loras: LoraLibrary | None = None,
        previews: bool = False,
        reports: WorkerReports | None = None,
        safety: SafetyGate | None = None,
        provenance: Provenance | None = None,
        drain_seconds: float = 0.0,
    ) -> None:
        self._store = store
        self._outputs = outputs
        self._backend = backend
        self._name = name
        self._slots = slots
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._drain_seconds = drain_seconds
        self._previews = previews
        self._safety = safety or SafetyGate()
        library, told = loras or LoraLibrary(lora_dir), provenance or Provenance()
        self._intake = Intake(outputs, library, self._safety, told, backend.preload)
        self._running: dict[str, Running] = {}
        self._waiting: tuple[Running, GenerationRequest] | None = None  # a suspect, until it can run alone
        self._fetching: dict[str, tuple[Running, Future[GenerationRequest]]] = {}  # until their files are here
        self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._lock = threading.Lock()  # guards _running's membership
        self._stopping = threading.Event()
        self._hurry = threading.Event()  # there is no time left for anything but handing back
        self._publisher = Publisher(store, outputs, patience=lease_seconds, hurry=self._hurry)
        self._stats = WorkerStats(slots)
        self._storing = Storing(self._publisher, self._safety, self._stats)
        self._noted = 0.0  # when the backend was last asked about itself
        self._heart = Heartbeat(
            store,
            name,
            self._held,
            self._stats,
            lease_seconds=lease_seconds,
            max_attempts=max_attempts,
            on_stall=on_stall,
            reports=reports,
            device=backend.device,
        )

    def stop(self) -> None:
        """Take no more jobs and end ``run``: when those here are done, or the time for that is over.

        Called a second time, or with no time for it, it ends ``run`` after the step in progress; what is unfinished
        then goes back to the queue.
        """
        if self._stopping.is_set() or not self._drain_seconds:
            self._hurry.set()
        self._stopping.set()

    def run(self) -> None:
        """Work until ``stop``, finish what there is time for, then hand back the rest.

        An exception of the backend ends it without handing back: the leases run out, and that counts against the
        jobs, so that one which breaks every worker is given up in the end.
        """
        self._heart.start()
        watcher = ChangeWatcher(self._store)
        try:
            while not self._stopping.is_set():
                try:
                    if not self.turn():
                        watcher.wait(IDLE_SECONDS)
                except Unavailable as error:
                    log.warning("the job store is away: %s", error)
                    self._stopping.wait(IDLE_SECONDS)
            self._drain()
            self._hand_back()
        finally:
            self._stopping.set()
            self._hurry.set()
            for running, _ in self._fetching.values():
                running.ended.set()
            self._fetchers.shutdown(wait=False, cancel_futures=True)
            self._heart.stop()

    def _drain(self) -> None:
        """Move the jobs that are here until they are done, or it is time to go."""
        deadline = time.monotonic() + self._drain_seconds
        while self._running and not self._hurry.is_set() and time.monotonic() < deadline:
            try:
                self.turn()
            except Unavailable as error:
                log.warning("the job store is away: %s", error)
                self._hurry.wait(IDLE_SECONDS)

    def turn(self) -> bool:
        """Claim what fits, move one step, deal with what came of it; return whether there was anything to do."""
        self._drop_told()
        self._settle(0.0 if self._backend.busy else FETCH_WAIT_SECONDS)
        self._claim()
        self._gather()
        self._heart.moved()
        self._note()
        if not self._backend.busy:
            return bool(self._fetching) or self._storing.busy
        began, events = time.monotonic(), self._backend.step()
        self._stats.moved(events)
        for event in events:
            self._handle(event)
        self._settle(STORE_SHARE * (time.monotonic() - began))
        return True

    def _note(self) -> None:
        """Ask the backend about itself, now and then, from the thread that it belongs to."""
        if time.monotonic() >= self._noted + NOTE_SECONDS:
            self._noted = time.monotonic()
            fetching = len(self._fetching)
            self._stats.note(len(self._running) - fetching, fetching, self._backend.usage())

    def _claim(self) -> None:
        """Fill the free slots, one job at a time; a suspect waits until it can run alone, and nothing joins it."""
        while self._has_room() and len(self._fetching) < FETCHES and self._may_claim():
            loaded = [name for running in self._running.values() for name in running.job.lora_key]
            jobs = self._store.claim(self._name, 1, self._lease_seconds, loaded=loaded)
            if not jobs:
                break
            self._admit(jobs[0])
        if self._waiting is not None and not self._backend.busy:
            running, request = self._waiting
            self._waiting = None
            self._submit(running, request)

    def _may_claim(self) -> bool:
        return not self._stopping.is_set() and self._publisher.files_are_there()

    def _submit(self, running: Running, request: GenerationRequest) -> None:
        shows = self._previews and self._safety.shows_previews(running.wants_check)
        options = {"preview_every": preview_every(request.num_inference_steps)} if shows else {}
        self._backend.submit(request, running.job.id, **options)

    def _admit(self, job: Job) -> None:
        running = Running(job, Lease(job.id, job.attempt), time.monotonic())
        with self._lock:
            self._running[job.id] = running
        log.info("job %s: attempt %d", job.id, job.attempt)
        if running.queued is not None:
            self._stats.stage("queue", running.queued)
        match job.input:
            case {"request": {"loras": [_, *_]}}:  # files may have to be fetched: not here, where others wait
                self._fetching[job.id] = (running, self._fetchers.submit(self._intake.request, running))
            case _:
                self._join(running, lambda: self._intake.request(running))

    def _join(self, running: Running, read: Callable[[], GenerationRequest]) -> None:
        """Hand a job to the backend, or keep it until it can run alone."""
        try:
            request = read()
        except Unavailable as error:
            self._put_back(running, error)
            return
        except Exception as error:  # noqa: BLE001  (a row that cannot be read is its own fault, not the worker's)
            self._fail(running, error)
            return
        self._stats.stage("fetch", time.monotonic() - running.claimed)
        if running.suspect:
            self._waiting = (running, request)
        else:
            self._submit(running, request)

    def _gather(self) -> None:
        """Let jobs whose files are here join, first come first served, while there is room."""
        if self._fetching and not self._backend.busy:
            wait([future for _, future in self._fetching.values()], FETCH_WAIT_SECONDS, FIRST_COMPLETED)
        for running, future in list(self._fetching.values()):
            if future.done() and (future.exception() is not None or self._has_room()):
                del self._fetching[running.job.id]
                self._join(running, future.result)

    def _has_room(self) -> bool:
        """Whether another job may join: there is a slot, and no suspect, which runs alone."""
        joined = [running for job_id, running in self._running.items() if job_id not in self._fetching]
        return len(joined) < self._slots and not any(running.suspect for running in joined)

    def _handle(self, event: Event) -> None:
        """Deal with one event; whatever goes wrong is that job's end, never the worker's or another job's."""
        running = self._running.get(event.request_id)
        if running is None:
            return
        try:
            match event:
                case Progress():
                    running.moved(event)
                    self._heart.tell()
                case Preview() if self._safety.shows_previews(running.wants_check):
                    running.looked(event)
                case ImageReady() | VideoReady():
                    self._storing.begin(running, event)
                case Finished():
                    self._stats.finished(event)
                    self._storing.finish(running, event)
                case Failed(error=error):
                    self._fail(running, error)
        except Exception as error:  # noqa: BLE001
            self._end_badly(running, error)

    def _settle(self, patience: float) -> None:
        """Deal with what is stored, or could not be, within ``patience``, and complete jobs that have everything."""
        for stored in self._storing.stored(patience):
            self._take(stored)
        for running, reports in self._storing.complete():
            if self._running.get(running.job.id) is running:
                try:
                    self._complete(running, reports)
                except Exception as error:  # noqa: BLE001
                    self._end_badly(running, error)

    def _take(self, stored: Stored) -> None:
        """Note one picture of a job that is still here; of others nobody will ever see it."""
        running = stored.running
        if self._running.get(running.job.id) is not running:
            self._publisher.delete(running.job.id, [stored.output.blob] if stored.output else [])
        elif stored.output is not None:
            running.outputs[stored.index] = stored.output
        elif stored.error is not None:
            self._end_badly(running, stored.error)

    def _end_badly(self, running: Running, error: Exception) -> None:
        self._backend.cancel(running.job.id)
        if isinstance(error, Unavailable):  # a full disk, say
            self._put_back(running, error)
        else:
            self._fail(running, error)

    def _complete(self, running: Running, reports: Sequence[Any]) -> None:
        self._forget(running)
        outputs = [running.outputs[index] for index in sorted(running.outputs)]
        timings = {"inference": round((time.monotonic() - running.claimed) * 1000)}
        named = [running.named(report) for report in reports]
        loras = [report.to_json() for report in named]
        done = self._publisher.complete(running.lease, outputs, timings, loras)
        if done:
            log.info("job %s: completed in %d ms", running.job.id, timings["inference"])
            self._stats.ended("completed")
            self._stats.stage("total", time.monotonic() - running.claimed)
            for report in named:
                log.info("job %s: LoRA %s", running.job.id, report.line())
            self._publisher.delete(running.job.id, running.inputs)
            return
        self._stats.ended("lost")
        if done is not None:  # else it may be complete, and the pictures its own
            self._publisher.delete(running.job.id, running.blobs)

    def _fail(self, running: Running, error: Exception) -> None:
        if isinstance(error, ImpastoError):
            message = error.located
        else:
            log.error("job %s failed", running.job.id, exc_info=error)
            message = f"the engine failed on this request ({type(error).__name__}); the server's log has the details"
        self._give_up(running, message, type(error).__name__)

    def _give_up(self, running: Running, message: str, error_class: str) -> None:
        self._forget(running)
        ended = self._publisher.fail(running.lease, message, error_class)
        self._stats.ended("failed" if ended else "lost")
        # A job that did not end here may run again, from the same pictures.
        self._publisher.delete(running.job.id, running.blobs + (running.inputs if ended else []))

    def _put_back(self, running: Running, error: Unavailable) -> None:
        """Let a job whose files cannot be stored or read now be run again, by whoever can, but not for ever."""
        self._publisher.files_failed(error)
        if running.lease.attempt >= self._max_attempts:
            log.error("job %s: files were away at each of %d attempts", running.job.id, running.lease.attempt)
            self._give_up(running, f"its files could not be stored or read: {error}", STORAGE)
        else:
            log.warning("job %s goes back to the queue: %s", running.job.id, error)
            self._release(running)

    def _forget(self, running: Running) -> None:
        with self._lock:
            self._running.pop(running.job.id, None)
        running.ended.set()
        self._fetching.pop(running.job.id, None)
        if self._waiting is not None and self._waiting[0] is running:
            self._waiting = None

    def _held(self) -> list[Running]:
        """All jobs that this worker has."""
        with self._lock:
            return list(self._running.values())

    def _drop_told(self) -> None:
        """Drop jobs the heartbeat found lost or cancelled."""
        ended = self._heart.take_ended()
        for running in self._held():
            if running.lease in ended:
                log.info("job %s: cancelled, or given to another worker", running.job.id)
                self._stats.ended(ended[running.lease])
                self._backend.cancel(running.job.id)
                self._forget(running)
                self._publisher.delete(running.job.id, running.blobs)

    def _beat(self) -> None:
        """Beat at once; ``run`` has a thread that does it."""
        self._heart.beat()

    def _hand_back(self) -> None:
        """Give unfinished jobs back to the queue, each on its own: one that cannot be is run after its lease."""
        for stored in self._storing.stop(STOP_SECONDS):
            self._take(stored)
        for running in list(self._running.values()):
            self._backend.cancel(running.job.id)
            self._release(running)

    def _release(self, running: Running) -> None:
        self._forget(running)
        self._stats.ended("released" if self._publisher.release(running.lease) else "lost")
        self._publisher.delete(running.job.id, running.blobs)
