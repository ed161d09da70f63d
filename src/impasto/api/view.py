"""From a job to the prediction object that clients read.

Knows both words for everything: the store's and the wire's. Knows nothing of routes. ``prediction`` reads output
files when base64 was asked for, so call it in a thread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pybase64
from fastapi import Request
from fastapi.responses import Response

from impasto.api.schemas import AppliedLora, Envelope, Prediction, PublicStatus, Steps, Urls
from impasto.api.service import Service
from impasto.jobs.records import Job
from impasto.jobs.states import Status

INVALID_PARAMETER: Final = 1401
EXECUTION_FAILED: Final = 1403
TASK_FAILED: Final = 1405
SYNC_TIMED_OUT: Final = 5004
_CODES: Final = {"InvalidInput": INVALID_PARAMETER, "LoraError": INVALID_PARAMETER}  # by error class; else 1403

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


def prediction(job: Job, service: Service, links: Links) -> Prediction:
    """Return the job as the wire shows it; the store gives outputs to completed jobs alone."""
    status = _PUBLIC[job.status]
    return Prediction(
        id=job.id,
        model=job.model,
        outputs=[_output(output.blob, job, service, links) for output in job.outputs],
        urls=Urls(get=links.result(job.id)),
        has_nsfw_contents=[output.nsfw for output in job.outputs],
        status=status,
        created_at=_timestamp(job.created_at),
        error=_error(job) if status == "failed" else "",
        executionTime=_execution_time(job),
        timings={"inference": 0} | {name: int(value) for name, value in job.timings.items()},
        seed=job.seed,
        loras=[AppliedLora.model_validate(report) for report in job.loras] or None,
        progress=_steps(job.progress) if status == "processing" else None,
        code=_code(job) if status == "failed" else None,
    )


def answer(job: Job, service: Service, links: Links) -> Response:
    """Return the job as a success; in a thread, see above."""
    return success(prediction(job, service, links))


def timed_out(shown: Prediction, seconds: float) -> Prediction:
    """Return the form that tells a synchronous client to come back later."""
    error = f"Sync mode timed out after {seconds:g} seconds. The prediction is still processing asynchronously."
    return shown.model_copy(update={"status": "processing", "code": SYNC_TIMED_OUT, "error": error})


def success(shown: Prediction) -> Response:
    """Return the envelope with status 200; absent optional values are left out, never ``null``."""
    body = Envelope(data=shown).model_dump_json(by_alias=True, exclude_none=True)
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


def _output(blob: str, job: Job, service: Service, links: Links) -> str:
    """Return a picture's URL, or its bytes as naked standard base64 where the request asked for that."""
    if job.input["output"]["base64"]:
        return pybase64.b64encode_as_string(service.outputs.get(blob))
    return links.output(blob)


def _error(job: Job) -> str:
    if job.status is Status.CANCELLED:
        return job.error if job.error.startswith("cancelled") else f"cancelled {job.error}".strip()
    return job.error or "failed for an unknown reason"


def _code(job: Job) -> int:
    return TASK_FAILED if job.status is Status.CANCELLED else _CODES.get(job.error_class, EXECUTION_FAILED)


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _execution_time(job: Job) -> int:
    """Return the milliseconds between the job's start and its end, 0 before that."""
    if job.started_at is None or job.finished_at is None:
        return 0
    return max(0, round((job.finished_at - job.started_at).total_seconds() * 1000))


def _steps(progress: Mapping[str, Any]) -> Steps | None:
    """Return the worker's report, if there is one that makes sense."""
    step, total = progress.get("step"), progress.get("total")
    return Steps(step=step, total=total) if isinstance(step, int) and isinstance(total, int) else None
