"""The worker's loop: claim jobs, move them step by step, store pictures, finish.

Knows the store, the output files and a backend. Knows no HTTP, and no torch: the backend is handed in.

Every write names the lease it was done under, so a worker that lost a job (it hung, the machine slept) can not
publish anything for it. Progress travels with the heartbeat, which also brings back cancellations.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from impasto.errors import ImpastoError, LoraError, Unavailable
from impasto.images import CONTENT_TYPES, encode_image
from impasto.jobs.events import ChangeWatcher
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Job, Lease, Output
from impasto.jobs.store import JobStore
from impasto.types import Event, Failed, Finished, GenerationRequest, ImageReady, LoraRef, OutputFormat, Progress
from impasto.worker.backend import Backend

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # longest sleep without a look at the queue, should a wake-up be lost
BEAT_SECONDS = 1.0  # between heartbeats, which carry progress out and cancellations in
BEATS_PER_LEASE = 4  # at least
STALL_LEASES = 20  # a backend that has not moved for this many leases no longer keeps its jobs


def new_name() -> str:
    """Return a worker name that no other worker has, and that tells an operator where it runs."""
    return f"{socket.gethostname()}-{secrets.token_hex(6)}"


@dataclass(slots=True, eq=False)
class Running:
    """A job in the backend."""

    job: Job
    lease: Lease
    claimed: float  # time.monotonic()
    outputs: dict[int, Output] = field(default_factory=dict)  # by image index
    progress: dict[str, Any] = field(default_factory=dict)


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
    ) -> None:
        self._store = store
        self._outputs = outputs
        self._backend = backend
        self._name = name
        self._lora_dir = lora_dir
        self._slots = slots
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._running: dict[str, Running] = {}
        self._lock = threading.Lock()  # guards _running's membership and _dropped
        self._dropped: set[Lease] = set()  # lost or cancelled leases, told by the heartbeat
        self._stopping = threading.Event()
        self._moved = time.monotonic()

    def stop(self) -> None:
        """End ``run`` after the step in progress; unfinished jobs go back to the queue."""
        self._stopping.set()

    def run(self) -> None:
        """Work until ``stop``, then hand back what is unfinished."""
        beat = threading.Thread(target=self._keep_leases, name="heartbeat", daemon=True)
        beat.start()
        watcher = ChangeWatcher(self._store)
        try:
            while not self._stopping.is_set():
                try:
                    if not self.turn():
                        watcher.wait(IDLE_SECONDS)
                except Unavailable as error:  # jobs whose result could not be written run again after their lease
                    log.warning("the job store is away: %s", error)
                    self._stopping.wait(IDLE_SECONDS)
        finally:
            self._stopping.set()
            beat.join(timeout=5)
            self._hand_back()

    def turn(self) -> bool:
        """Claim what fits, move one step, deal with what came of it; return whether there was anything to do."""
        self._drop_told()
        self._claim()
        self._moved = time.monotonic()
        if not self._backend.busy:
            return False
        for event in self._backend.step():
            self._handle(event)
        return True

    def _claim(self) -> None:
        free = self._slots - len(self._running)
        if free < 1:
            return
        for job in self._store.claim(self._name, free, self._lease_seconds):
            running = Running(job, Lease(job.id, job.attempt), time.monotonic())
            try:
                request = self._request(job)
            except ImpastoError as error:
                self._fail(running, error)
                continue
            with self._lock:
                self._running[job.id] = running
            self._backend.submit(request, job.id)
            log.info("job %s: attempt %d", job.id, job.attempt)

    def _request(self, job: Job) -> GenerationRequest:
        """Rebuild the request, with the resolved seed and each LoRA's name turned into a file."""
        request = GenerationRequest.from_json(job.input["request"])
        loras = tuple(
            LoraRef(str(self._lora_file(lora.path, f"loras.{i}.path")), lora.scale)
            for i, lora in enumerate(request.loras)
        )
        return replace(request, seed=job.seed, loras=loras)

    def _lora_file(self, name: str, field_path: str) -> Path:
        """Find an operator's LoRA by ``name`` or ``owner/name``; nothing outside the LoRA folder is reachable."""
        plain = name.removesuffix(".safetensors")
        for file in self._lora_dir.glob("**/*.safetensors"):
            if file.relative_to(self._lora_dir).with_suffix("").as_posix() == plain:
                return file
        raise LoraError(
            field_path, f"{name[:200]!r} was not found: put {plain[:200]}.safetensors into the server's loras folder"
        )

    def _handle(self, event: Event) -> None:
        running = self._running.get(event.request_id)
        if running is None:
            return
        match event:
            case Progress(step=step, total=total):
                running.progress = {"step": step, "total": total}
            case ImageReady():
                try:
                    self._store_picture(running, event)
                except Exception as error:  # noqa: BLE001  (a full disk fails the job, not the worker)
                    self._backend.cancel(event.request_id)
                    self._fail(running, error)
            case Finished():
                self._complete(running)
            case Failed(error=error):
                self._fail(running, error)

    def _store_picture(self, running: Running, event: ImageReady) -> None:
        file_format: OutputFormat = running.job.input["output"]["format"]
        content_type = CONTENT_TYPES[file_format]
        data = encode_image(event.image, file_format)
        blob = self._outputs.put(running.job.id, running.lease.attempt, event.index, data, content_type)
        width, height = event.image.size
        running.outputs[event.index] = Output(blob, content_type, width, height, nsfw=False, seed=event.seed)

    def _complete(self, running: Running) -> None:
        self._forget(running)
        outputs = [running.outputs[index] for index in sorted(running.outputs)]
        timings = {"inference": round((time.monotonic() - running.claimed) * 1000)}
        if self._store.complete(running.lease, outputs, timings):
            log.info("job %s: completed in %d ms", running.job.id, timings["inference"])
        else:
            self._discard(running)

    def _fail(self, running: Running, error: Exception) -> None:
        self._forget(running)
        if isinstance(error, ImpastoError):
            message = str(error)
        else:
            log.error("job %s failed", running.job.id, exc_info=error)
            message = f"the engine failed on this request ({type(error).__name__}); the server's log has the details"
        self._store.fail(running.lease, message, type(error).__name__)
        self._discard(running)

    def _discard(self, running: Running) -> None:
        """Delete the pictures of an attempt that nobody will see."""
        self._outputs.delete([output.blob for output in running.outputs.values()])

    def _forget(self, running: Running) -> None:
        with self._lock:
            self._running.pop(running.job.id, None)

    def _drop_told(self) -> None:
        """Drop jobs the heartbeat found lost or cancelled."""
        with self._lock:
            dropped, self._dropped = self._dropped, set()
            gone = [running for running in self._running.values() if running.lease in dropped]
        for running in gone:
            log.info("job %s: cancelled, or given to another worker", running.job.id)
            self._backend.cancel(running.job.id)
            self._forget(running)
            self._discard(running)

    def _keep_leases(self) -> None:
        """Send heartbeats from a thread of their own: a step may take longer than a lease."""
        while not self._stopping.wait(min(BEAT_SECONDS, self._lease_seconds / BEATS_PER_LEASE)):
            if time.monotonic() - self._moved > STALL_LEASES * self._lease_seconds:
                log.error("the backend has not moved for %d leases; letting its jobs go", STALL_LEASES)
                continue
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
        for running in list(self._running.values()):
            self._backend.cancel(running.job.id)
            self._store.release(running.lease)
            self._discard(running)
            self._forget(running)
