"""What a job became, in the OpenAI dialect: finished pictures, or why there are none.

Knows the answer's form. Knows nothing of how a request waits (``hold.py``, ``openai_stream.py``). All of it reads files
or the store, so call it in a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pybase64

from impasto.api.openai_errors import JobFailed
from impasto.api.openai_form import ImageForm
from impasto.api.service import Service
from impasto.api.view import Links, prediction
from impasto.jobs.records import Job
from impasto.jobs.states import Status

_BLAMED: Final = ("InvalidInput", "LoraError", "MediaError", "ContentRefused")  # the request itself was at fault
# Nothing is counted or billed; clients that keep accounts find zeros.
USAGE: Final = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@dataclass(frozen=True, slots=True)
class Answers:
    """Writes answers to one request."""

    form: ImageForm
    service: Service
    links: Links

    def finished(self, job: Job) -> dict[str, Any]:
        """Return the finished pictures.

        Raises:
            JobFailed: There are none. A job that is still going is stopped: nobody could read its result here.
        """
        if job.status is not Status.COMPLETED:
            raise self._failure(job)
        return {
            "created": int(job.finished_at.timestamp()) if job.finished_at else 0,
            "data": self._pictures(job),
            **self.shape(job),
            "usage": USAGE,
            "id": job.id,
            "loras": list(job.loras),
        }

    def shape(self, job: Job) -> dict[str, Any]:
        """Return what is known of the pictures before they are made."""
        request, output = job.input["request"], job.input["output"]
        size = f"{request['width']}x{request['height']}"
        return {"size": size, "output_format": output["format"], "background": "opaque", "quality": "auto"}

    def _pictures(self, job: Job) -> list[dict[str, Any]]:
        """Return each picture as address, base64 or both: old clients read the one unasked, new ones the other."""
        where, shown = self.form.response_format, prediction(job, self.service, self.links)
        pictures: list[dict[str, Any]] = []
        for output, url in zip(job.outputs, shown.outputs, strict=True):
            picture: dict[str, Any] = {"seed": output.seed}
            if where != "b64_json":
                picture["url"] = url
            if where != "url":
                picture["b64_json"] = pybase64.b64encode_as_string(self.service.outputs.get(output.blob))
            pictures.append(picture)
        return pictures

    def _failure(self, job: Job) -> JobFailed:
        if job.status is Status.CANCELLED:
            return JobFailed(f"The job {job.id} was cancelled.", code="cancelled")
        if job.status is Status.FAILED:
            param = ("model" if self.form.name.loras else "loras") if job.error_class == "LoraError" else None
            return JobFailed(job.error, param, status=400 if job.error_class in _BLAMED else 500)
        self.service.store.cancel(job.id, job.key_id)
        limit = f"{self.service.settings.openai_timeout:g} s"
        return JobFailed(f"The pictures were not made within {limit}; the job was cancelled.", None, "timeout", 504)
