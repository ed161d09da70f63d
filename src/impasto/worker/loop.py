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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impasto.errors import ImpastoError, MediaError, NotFound, Unavailable
from impasto.images import CONTENT_TYPES, decode_png, encode_image
from impasto.jobs.events import ChangeWatcher
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Job, Lease, Output
from impasto.jobs.store import JobStore
from impasto.jobs.workers import WorkerReports
from impasto.safety.gate import SafetyGate
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
from impasto.worker.heartbeat import Heartbeat
from impasto.worker.loras import LoraLibrary
from impasto.worker.previews import preview_every
from impasto.worker.running import Running
from impasto.worker.stats import WorkerStats

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # longest sleep without a look at the queue, should a wake-up be lost
RETRY_SECONDS = 0.5  # between tries of a write while the store is away
FETCHES = 16  # most jobs that wait for their files; they take no slot
FETCH_WAIT_SECONDS = 0.1  # for files, while there is nothing else to do
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
    ) -> None:
        self._store = store
        self._outputs = outputs
        self._backend = backend
        self._name = name
        self._loras = loras or LoraLibrary(lora_dir)
        self._slots = slots
        self._lease_seconds = lease_seconds
        self._previews = previews
        self._safety = safety or SafetyGate()
        self._running: dict[str, Running] = {}
        self._waiting: tuple[Running, GenerationRequest] | None = None  # a suspect, until it can run alone
        self._fetching: dict[str, tuple[Running, Future[GenerationRequest]]] = {}  # until their files are here
        self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._lock = threading.Lock()  # guards _running's membership
        self._stopping = threading.Event()
        self._stats = WorkerStats(slots)
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
        """End ``run`` after the step in progress; unfinished jobs go back to the queue."""
        self._stopping.set()

    def run(self) -> None:
        """Work until ``stop``, then hand back what is unfinished.

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
            self._hand_back()
        finally:
            self._stopping.set()
            for running, _ in self._fetching.values():
                running.ended.set()
            self._fetchers.shutdown(wait=False, cancel_futures=True)
            self._heart.stop()

    def turn(self) -> bool:
        """Claim what fits, move one step, deal with what came of it; return whether there was anything to do."""
        self._drop_told()
        self._claim()
        self._gather()
        self._heart.moved()
        self._note()
        if not self._backend.busy:
            return bool(self._fetching)
        events = self._backend.step()
        self._count(events)
        for event in events:
            self._handle(event)
        return True

    def _count(self, events: Sequence[Event]) -> None:
        """Count a step once, though every request in it reports progress."""
        progress = next((event for event in events if isinstance(event, Progress)), None)
        if progress is not None:
            self._stats.stepped(progress)

    def _note(self) -> None:
        """Ask the backend about itself, now and then, from the thread that it belongs to."""
        if time.monotonic() >= self._noted + NOTE_SECONDS:
            self._noted = time.monotonic()
            fetching = len(self._fetching)
            self._stats.note(len(self._running) - fetching, fetching, self._backend.usage())

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
            self._submit(running, request)

    def _submit(self, running: Running, request: GenerationRequest) -> None:
        options = {"preview_every": preview_every(request.num_inference_steps)} if self._shows_previews(running) else {}
        self._backend.submit(request, running.job.id, **options)

    def _shows_previews(self, running: Running) -> bool:
        return self._previews and self._safety.shows_previews(_wants_check(running))

    def _admit(self, job: Job) -> None:
        running = Running(job, Lease(job.id, job.attempt), time.monotonic())
        with self._lock:
            self._running[job.id] = running
        log.info("job %s: attempt %d", job.id, job.attempt)
        if running.queued is not None:
            self._stats.stage("queue", running.queued)
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

    def _request(self, running: Running) -> GenerationRequest:
        """Rebuild the request, with its pictures, the resolved seed and each LoRA's name turned into a file."""
        job = running.job
        request = GenerationRequest.from_json(job.input["request"])
        image, mask = (self._picture(job, name) for name in ("image", "mask_image"))
        self._safety.admit(request.prompt, image, _wants_check(running))
        running.loras = tuple(
            self._loras.find(lora.path, f"loras.{i}.path", job.key_id, running.ended.is_set)
            for i, lora in enumerate(request.loras)
        )
        loras = tuple(
            replace(lora, path=str(found.file)) for found, lora in zip(running.loras, request.loras, strict=True)
        )
        return replace(request, seed=job.seed, loras=loras, image=image, mask_image=mask)

    def _picture(self, job: Job, name: str) -> Image | None:
        """Read back a picture that the job starts from; the API has checked and re-encoded it."""
        key = job.input.get("pictures", {}).get(name)
        try:
            return None if key is None else decode_png(self._outputs.get_input(key))
        except NotFound:
            raise MediaError(name, "is not stored any more; submit the request again") from None

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
                case Preview() if self._safety.shows_previews(_wants_check(running)):
                    running.looked(event)
                case ImageReady():
                    self._store_picture(running, event)
                case Finished(reports=reports):
                    self._stats.finished(event)
                    self._complete(running, reports)
                case Failed(error=error):
                    self._fail(running, error)
        except Exception as error:  # noqa: BLE001  (a full disk, say)
            self._backend.cancel(event.request_id)
            self._fail(running, error)

    def _store_picture(self, running: Running, event: ImageReady) -> None:
        start = time.monotonic()
        file_format: OutputFormat = running.job.input["output"]["format"]
        content_type = CONTENT_TYPES[file_format]
        image, nsfw = self._safety.passed(event.image, _wants_check(running))
        data = encode_image(image, file_format)
        blob = self._outputs.put(running.job.id, running.lease.attempt, event.index, data, content_type)
        width, height = image.size
        running.outputs[event.index] = Output(blob, content_type, width, height, nsfw=nsfw, seed=event.seed)
        self._stats.stored(time.monotonic() - start)

    def _complete(self, running: Running, reports: Sequence[Any]) -> None:
        self._forget(running)
        outputs = [running.outputs[index] for index in sorted(running.outputs)]
        timings = {"inference": round((time.monotonic() - running.claimed) * 1000)}
        named = [_named(report, running) for report in reports]
        loras = [report.to_json() for report in named]
        if self._written(lambda: self._store.complete(running.lease, outputs, timings, loras)):
            log.info("job %s: completed in %d ms", running.job.id, timings["inference"])
            self._stats.ended("completed")
            self._stats.stage("total", time.monotonic() - running.claimed)
            for report in named:
                log.info("job %s: LoRA %s", running.job.id, report.line())
            self._delete(running, running.inputs)
        else:
            self._stats.ended("lost")
            self._delete(running, running.blobs)

    def _fail(self, running: Running, error: Exception) -> None:
        self._forget(running)
        if isinstance(error, ImpastoError):
            message = str(error)
        else:
            log.error("job %s failed", running.job.id, exc_info=error)
            message = f"the engine failed on this request ({type(error).__name__}); the server's log has the details"
        ended = self._written(lambda: self._store.fail(running.lease, message, type(error).__name__))
        self._stats.ended("failed" if ended else "lost")
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
                self._delete(running, running.blobs)

    def _beat(self) -> None:
        """Beat at once; ``run`` has a thread that does it."""
        self._heart.beat()

    def _hand_back(self) -> None:
        """Give unfinished jobs back to the queue, each on its own: one that cannot be is run after its lease."""
        for running in list(self._running.values()):
            self._backend.cancel(running.job.id)
            try:
                self._store.release(running.lease)
                self._stats.ended("released")
            except Unavailable as error:
                log.warning("job %s could not be handed back: %s", running.job.id, error)
            self._delete(running, running.blobs)
            self._forget(running)


def _wants_check(running: Running) -> bool:
    """Whether the request wants its pictures checked; one that does not say wants it."""
    return bool(running.job.input["output"].get("safety_checker", True))


def _named(report: Any, running: Running) -> Any:
    """Put the name that the user gave into a LoRA's report, which knows our file alone, and what the name led to."""
    found = running.loras[report.position]
    asked: str = running.job.input["request"]["loras"][report.position]["path"]
    return report.named(asked, found.source, found.alias_of)
