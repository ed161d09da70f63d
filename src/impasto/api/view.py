"""From a job to the prediction object that clients read.

Knows both words for everything: the store's and the wire's. Knows nothing of routes. ``prediction`` reads output
files when base64 was asked for, so call it in a thread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import pybase64
from fastapi import Request
from fastapi.responses import Response

from impasto.api.schemas import AppliedLora, Envelope, Prediction, PublicStatus, Steps, Urls, Wire
from impasto.api.service import Service
from impasto.jobs.records import Job
from impasto.jobs.states import Status
from impasto.jobs.store import WITHDRAWN

CONTENT_REFUSED: Final = 1200
INVALID_PARAMETER: Final = 1401
MEDIA_FAILED: Final = 1402
EXECUTION_FAILED: Final = 1403
TASK_FAILED: Final = 1405
SYNC_TIMED_OUT: Final = 5004
_CODES: Final = {  # by error class; else 1403
    "InvalidInput": INVALID_PARAMETER,
    "LoraError": INVALID_PARAMETER,
    "MediaError": MEDIA_FAILED,
    "ContentRefused": CONTENT_REFUSED,
}

# A cancelled job is shown as failed: many clients know no other end and would poll for hours.
_PUBLIC: Final[Mapping[Status, PublicStatus]] = {
    Status.CREATED: "created",
    Status.PROCESSING: "processing",
    Status.COMPLETED: "completed",
    Status.FAILED: "failed",
    Status.CANCELLED: "failed",
}
_HOST = re.compile(r"[A-Za-z0-9._~\-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Links:
    """Makes absolute URLs on the host that the client used, in the API version it used."""

    base: str
    version: str

    @classmethod
    def of(cls, request: Request, service: Service) -> Links:
        """Take the base from the setting, or else from the request; the path has the version."""
        base = service.settings.public_url or _called(request)
        return cls(base.rstrip("/"), "v2" if "/api/v2/" in request.url.path else "v3")

    def result(self, job_id: str) -> str:
        """Where the prediction is read; needs the key."""
        return f"{self.base}/api/{self.version}/predictions/{job_id}/result"

    def output(self, blob: str) -> str:
        """Where a picture is read, without a key: the blob's name is the secret."""
        return f"{self.base}/outputs/{blob}"


def _called(request: Request) -> str:
    """Return scheme and host as the client wrote them; a host that is none gives way to the socket's address."""
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        address, port = request.scope.get("server") or ("localhost", None)
        host = f"{address}:{port}" if port else address
    return f"{request.url.scheme}://{host}"


def public_status(job: Job) -> PublicStatus:
    """Return the word for where a job stands. Nobody waits for a withdrawn one, so it is shown as what it will be."""
    return "failed" if job.withdrawn else _PUBLIC[job.status]


def prediction(job: Job, service: Service, links: Links, *, as_urls: bool = False) -> Prediction:
    """Return the job as the wire shows it; the store gives outputs to completed jobs alone.

    Args:
        job: The job.
        service: Has the files.
        links: Makes addresses.
        as_urls: Show outputs by their addresses even if base64 was asked for.
    """
    status = public_status(job)
    outputs = () if job.expired_at else job.outputs
    place = service.reports.line.place(job.id) if status == "created" else None
    return Prediction(
        id=job.id,
        model=job.model,
        outputs=[_output(output.blob, job, service, links, as_urls) for output in outputs],
        urls=Urls(get=links.result(job.id)),
        has_nsfw_contents=[output.nsfw for output in outputs],
        status=status,
        created_at=_timestamp(job.created_at),
        error=_error(job) if status == "failed" else "",
        executionTime=_execution_time(job),
        timings={"inference": 0} | {name: int(value) for name, value in job.timings.items()},
        seed=job.seed,
        loras=[AppliedLora.model_validate(report) for report in job.loras] or None,
        reproduce=_reproduce(job),
        progress=_steps(job.progress) if status == "processing" else None,
        queue_position=place.position if place else None,
        estimated_seconds=place.seconds if place else None,
        expired_at=_timestamp(job.expired_at) if job.expired_at and job.outputs else None,
        code=_code(job) if status == "failed" else None,
    )


def reads_files(job: Job) -> bool:
    """Whether the answer holds pictures, so that making it belongs in a thread."""
    return bool(job.outputs and not job.expired_at and job.input["output"]["base64"])


def answer(job: Job, service: Service, links: Links) -> Response:
    """Return the job as a success; in a thread if it ``reads_files``."""
    if not reads_files(job):
        return success(prediction(job, service, links))
    key = (job.id, links.base, links.version)
    return _json(service.finished.get(key, lambda: _with_base64(job, service, links)))


def timed_out(shown: Prediction, seconds: float) -> Prediction:
    """Return the form that tells a synchronous client to come back later."""
    error = f"Sync mode timed out after {seconds:g} seconds. The prediction is still processing asynchronously."
    return shown.model_copy(update={"status": "processing", "code": SYNC_TIMED_OUT, "error": error})


def success(shown: Prediction) -> Response:
    """Return a prediction in its envelope."""
    return enveloped(Envelope(data=shown))


def enveloped(envelope: Wire) -> Response:
    """Return an envelope with status 200; absent optional values are left out, never ``null``."""
    return _json(envelope.model_dump_json(by_alias=True, exclude_none=True).encode())


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


def _with_base64(job: Job, service: Service, links: Links) -> bytes:
    """Return the envelope of a completed job, its outputs put in as they are: base64 needs no escapes in JSON."""
    shown = prediction(replace(job, outputs=()), service, links)
    flags = [output.nsfw for output in job.outputs]
    envelope = Envelope(data=shown.model_copy(update={"has_nsfw_contents": flags}))
    head, mark, tail = envelope.model_dump_json(by_alias=True, exclude_none=True).encode().partition(b'"outputs":[')
    encoded = b'","'.join(pybase64.b64encode(service.outputs.get(output.blob)) for output in job.outputs)
    return b"".join((head, mark, b'"', encoded, b'"', tail))


def _output(blob: str, job: Job, service: Service, links: Links, as_urls: bool) -> str:
    """Return a picture's URL, or its bytes as naked standard base64 where the request asked for that."""
    if job.input["output"]["base64"] and not as_urls:
        return pybase64.b64encode_as_string(service.outputs.get(blob))
    return links.output(blob)


def _reproduce(job: Job) -> dict[str, Any] | None:
    """Return the worker's record with what was asked for; LoRAs stand in the record, and pictures by their hashes."""
    made = next((output.made for output in job.outputs if output.made), None)
    if made is None:
        return None
    asked = {name: value for name, value in job.input["request"].items() if name not in ("loras", "seed")}
    return {**made, "request": asked, "seeds": [output.seed for output in job.outputs]}


def _error(job: Job) -> str:
    if job.withdrawn:
        return WITHDRAWN
    if job.status is Status.CANCELLED:
        return job.error if job.error.startswith("cancelled") else f"cancelled {job.error}".strip()
    return job.error or "failed for an unknown reason"


def _code(job: Job) -> int:
    cancelled = job.withdrawn or job.status is Status.CANCELLED
    return TASK_FAILED if cancelled else _CODES.get(job.error_class, EXECUTION_FAILED)


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _execution_time(job: Job) -> int:
    """Return the milliseconds between the job's start and its end, 0 before that."""
    if job.started_at is None or job.finished_at is None:
        return 0
    return max(0, round((job.finished_at - job.started_at).total_seconds() * 1000))


def _steps(progress: Mapping[str, Any]) -> Steps | None:
    """Return the worker's report, if there is one that makes sense."""
    step, total, sigma = (progress.get(name) for name in ("step", "total", "sigma"))
    return Steps(step=step, total=total, sigma=sigma) if isinstance(step, int) and isinstance(total, int) else None
