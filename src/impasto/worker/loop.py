"""The worker's loop: claim jobs, move them step by step, store pictures, finish.

Knows the store, the output files and a backend. Knows no HTTP, and no torch: the backend is handed in.

Every write names the lease it was done under, so a worker that lost a job (it hung, the machine slept) can not
publish anything for it. Progress travels with the heartbeat, which also brings back cancellations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impasto.errors import ImpastoError, InvalidInput, NotFound, Unavailable
from impasto.images import CONTENT_TYPES, decode_png, encode_image
from impasto.jobs.events import ChangeWatcher
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Job, Lease, Output
from impasto.jobs.store import JobStore
from impasto.types import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ImageReady,
    OutputFormat,
    Preview,
    Progress,
)
from impasto.worker.backend import Backend
from impasto.worker.loras import FoundLora, LoraLibrary

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # longest sleep without a look at the queue, should a wake-up be lost
RETRY_SECONDS = 0.5  # between tries of a write while the store is away
BEAT_SECONDS = 1.0  # between heartbeats, which carry progress out and cancellations in
BEATS_PER_LEASE = 4  # at least
FETCHES = 16  # most jobs that wait for their files; they take no slot
FETCH_WAIT_SECONDS = 0.1  # for files, while there is nothing else to do
STALL_LEASES = 20  # a backend that has not moved for this many leases will not


@dataclass(slots=True, eq=False)
class Running:
    """A job in the backend."""

    job: Job
    lease: Lease
    claimed: float  # time.monotonic()
    outputs: dict[int, Output] = field(default_factory=dict)  # by image index
    progress: dict[str, Any] = field(default_factory=dict)
    loras: tuple[FoundLora, ...] = ()  # as the request orders them; their files stay for as long as this lives
    ended: threading.Event = field(default_factory=threading.Event)  # nobody waits for its files any more

    @property
    def suspect(self) -> bool:
        """Whether an earlier attempt ended without a result: it may be this job that kills workers."""
        return self.lease.attempt > 1

    @property
    def blobs(self) -> list[str]:
        """The pictures this attempt has stored."""
        return [output.blob for output in self.outputs.values()]

    @property
    def inputs(self) -> list[str]:
        """Keys of the pictures the job starts from."""
        return list(self.job.input.get("pictures", {}).values())


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
        on_stall: Called, from another thread, when the backend has not moved for ``STALL_LEASES`` leases.
        loras: Finds the LoRAs that requests name; by default in ``lora_dir`` alone.
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
    ) -> None:
        self._store = store
        self._outputs = outputs
        self._backend = backend
        self._name = name
        self._loras = loras or LoraLibrary(lora_dir)
        self._slots = slots
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._on_stall = on_stall
        self._running: dict[str, Running] = {}
        self._waiting: tuple[Running, GenerationRequest] | None = None  # a suspect, until it can run alone
        self._fetching: dict[str, tuple[Running, Future[GenerationRequest]]] = {}  # until their files are here
        self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._lock = threading.Lock()  # guards _running's membership and _dropped
        self._dropped: set[Lease] = set()  # lost or cancelled leases, told by the heartbeat
        self._stopping = threading.Event()
        self._moved = time.monotonic()

    def stop(self) -> None:
        """End ``run`` after the step in progress; unfinished jobs go back to the queue."""
        self._stopping.set()

    def run(self) -> None:
        """Work until ``stop``, then hand back what is unfinished.

        An exception of the backend ends it without handing back: the leases run out, and that counts against the
        jobs, so that one which breaks every worker is given up in the end.
        """
        beat = threading.Thread(target=self._keep_leases, name="heartbeat", daemon=True)
        beat.start()
        watcher = ChangeWatcher(self._store)
        try:
            while not self._stopping.is_set():
                try:
                    if not self.turn():
                        watcher.wait(IDLE_SECONDS)
                except Unavailable as error:
                    log.warning("the job store is away: %s", error)
                    self._stopping.wait(IDLE_SECONDS)
            self._hand_back()
        finally:
            self._stopping.set()
            for running, _ in self._fetching.values():
                running.ended.set()
            self._fetchers.shutdown(wait=False, cancel_futures=True)
            beat.join(timeout=5)

    def turn(self) -> bool:
        """Claim what fits, move one step, deal with what came of it; return whether there was anything to do."""
        self._drop_told()
        self._claim()
        self._gather()
        self._moved = time.monotonic()
        if not self._backend.busy:
            return bool(self._fetching)
        for event in self._backend.step():
            self._handle(event)
        return True

    def _claim(self) -> None:
        """Fill the free slots, one job at a time; a suspect waits until it can run alone, and nothing joins it."""
        while self._has_room() and len(self._fetching) < FETCHES:
            loaded = [name for running in self._running.values() for name in running.job.lora_key]
            jobs = self._store.claim(self._name, 1, self._lease_seconds, loaded=loaded)
            if not jobs:
                break
            self._admit(jobs[0])
        if self._waiting is not None and not self._backend.busy:
            running, request = self._waiting
            self._waiting = None
            self._backend.submit(request, running.job.id)

    def _admit(self, job: Job) -> None:
        running = Running(job, Lease(job.id, job.attempt), time.monotonic())
        with self._lock:
            self._running[job.id] = running
        log.info("job %s: attempt %d", job.id, job.attempt)
        match job.input:
            case {"request": {"loras": [_, *_]}}:  # files may have to be fetched: not here, where others wait
                self._fetching[job.id] = (running, self._fetchers.submit(self._request, running))
            case _:
                self._join(running, lambda: self._request(running))

    def _join(self, running: Running, read: Callable[[], GenerationRequest]) -> None:
        """Hand a job to the backend, or keep it until it can run alone."""
        try:
            request = read()
        except Exception as error:  # noqa: BLE001  (a row that cannot be read is its own fault, not the worker's)
            self._fail(running, error)
            return
        if running.suspect:
            self._waiting = (running, request)
        else:
            self._backend.submit(request, running.job.id)

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

    def _request(self, running: Running) -> GenerationRequest:
        """Rebuild the request, with its pictures, the resolved seed and each LoRA's name turned into a file."""
        job = running.job
        request = GenerationRequest.from_json(job.input["request"])
        running.loras = tuple(
            self._loras.find(lora.path, f"loras.{i}.path", job.key_id, running.ended.is_set)
            for i, lora in enumerate(request.loras)
        )
        loras = tuple(
            replace(lora, path=str(found.file)) for found, lora in zip(running.loras, request.loras, strict=True)
        )
        image, mask = (self._picture(job, name) for name in ("image", "mask_image"))
        return replace(request, seed=job.seed, loras=loras, image=image, mask_image=mask)

    def _picture(self, job: Job, name: str) -> Image | None:
        """Read back a picture that the job starts from; the API has checked and re-encoded it."""
        key = job.input.get("pictures", {}).get(name)
        try:
            return None if key is None else decode_png(self._outputs.get_input(key))
        except NotFound:
            raise InvalidInput(name, "is not stored any more; submit the request again") from None

    def _handle(self, event: Event) -> None:
        """Deal with one event; whatever goes wrong is that job's end, never the worker's or another job's."""
        running = self._running.get(event.request_id)
        if running is None:
            return
        try:
            match event:
                case Progress(step=step, total=total):
                    running.progress = {"step": step, "total": total}
                case Preview():
                    pass  # nobody is shown previews yet
                case ImageReady():
                    self._store_picture(running, event)
                case Finished(reports=reports):
                    self._complete(running, reports)
                case Failed(error=error):
                    self._fail(running, error)
        except Exception as error:  # noqa: BLE001  (a full disk, say)
            self._backend.cancel(event.request_id)
            self._fail(running, error)

    def _store_picture(self, running: Running, event: ImageReady) -> None:
        file_format: OutputFormat = running.job.input["output"]["format"]
        content_type = CONTENT_TYPES[file_format]
        data = encode_image(event.image, file_format)
        blob = self._outputs.put(running.job.id, running.lease.attempt, event.index, data, content_type)
        width, height = event.image.size
        running.outputs[event.index] = Output(blob, content_type, width, height, nsfw=False, seed=event.seed)

    def _complete(self, running: Running, reports: Sequence[Any]) -> None:
        self._forget(running)
        outputs = [running.outputs[index] for index in sorted(running.outputs)]
        timings = {"inference": round((time.monotonic() - running.claimed) * 1000)}
        named = [_named(report, running) for report in reports]
        loras = [report.to_json() for report in named]
        if self._written(lambda: self._store.complete(running.lease, outputs, timings, loras)):
            log.info("job %s: completed in %d ms", running.job.id, timings["inference"])
            for report in named:
                log.info("job %s: LoRA %s", running.job.id, report.line())
            self._delete(running, running.inputs)
        else:
            self._delete(running, running.blobs)

    def _fail(self, running: Running, error: Exception) -> None:
        self._forget(running)
        if isinstance(error, ImpastoError):
            message = str(error)
        else:
            log.error("job %s failed", running.job.id, exc_info=error)
            message = f"the engine failed on this request ({type(error).__name__}); the server's log has the details"
        ended = self._written(lambda: self._store.fail(running.lease, message, type(error).__name__))
        # A job that did not end here may run again, from the same pictures.
        self._delete(running, running.blobs + (running.inputs if ended else []))

    def _written(self, write: Callable[[], bool]) -> bool:
        """Try to end a job until the store answers; when the lease has run out, the job will be run again."""
        deadline = time.monotonic() + self._lease_seconds
        while True:
            try:
                return write()
            except Unavailable as error:
                log.warning("the job store is away: %s", error)
                if time.monotonic() > deadline or self._stopping.wait(RETRY_SECONDS):
                    return False

    def _delete(self, running: Running, files: list[str]) -> None:
        """Delete files that nobody needs any more: pictures nobody will see, or start pictures of an ended job."""
        try:
            self._outputs.delete(files)
        except Exception:  # files that stay cost space, nothing else
            log.exception("job %s: its files could not be deleted", running.job.id)

    def _forget(self, running: Running) -> None:
        with self._lock:
            self._running.pop(running.job.id, None)
        running.ended.set()
        self._fetching.pop(running.job.id, None)
        if self._waiting is not None and self._waiting[0] is running:
            self._waiting = None

    def _drop_told(self) -> None:
        """Drop jobs the heartbeat found lost or cancelled."""
        with self._lock:
            dropped, self._dropped = self._dropped, set()
            gone = [running for running in self._running.values() if running.lease in dropped]
        for running in gone:
            log.info("job %s: cancelled, or given to another worker", running.job.id)
            self._backend.cancel(running.job.id)
            self._forget(running)
            self._delete(running, running.blobs)

    def _keep_leases(self) -> None:
        """Send heartbeats from a thread of their own: a step may take longer than a lease."""
        while not self._stopping.wait(min(BEAT_SECONDS, self._lease_seconds / BEATS_PER_LEASE)):
            if time.monotonic() - self._moved > STALL_LEASES * self._lease_seconds:
                log.error("the backend has not moved for %d leases", STALL_LEASES)
                self._on_stall()
                return
            try:
                self._beat()
            except Exception:  # the database may be away for a moment: keep trying inside the lease
                log.exception("heartbeat failed")

    def _beat(self) -> None:
        with self._lock:
            progress = {running.lease: dict(running.progress) for running in self._running.values()}
        if progress:
            beat = self._store.heartbeat(self._name, progress, self._lease_seconds)
            with self._lock:
                self._dropped |= beat.lost | beat.cancelled
        self._store.reap(self._max_attempts)

    def _hand_back(self) -> None:
        """Give unfinished jobs back to the queue, each on its own: one that cannot be is run after its lease."""
        for running in list(self._running.values()):
            self._backend.cancel(running.job.id)
            try:
                self._store.release(running.lease)
            except Unavailable as error:
                log.warning("job %s could not be handed back: %s", running.job.id, error)
            self._delete(running, running.blobs)
            self._forget(running)


def _named(report: Any, running: Running) -> Any:
    """Put the name that the user gave into a LoRA's report, which knows our file alone, and what the name led to."""
    found = running.loras[report.position]
    asked: str = running.job.input["request"]["loras"][report.position]["path"]
    return report.named(asked, found.source, found.alias_of)
