"""Pictures as events: ``stream: true`` in the OpenAI dialect.

Knows the events' form: previews of the first picture while it is made, then each finished picture. Knows nothing of how
news are found (``listening.py``). The end of the job ends the stream; a client that goes before withdraws its job.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from impasto.api.listening import Listener
from impasto.api.openai_answer import Answers
from impasto.api.openai_errors import JobFailed, error_body
from impasto.errors import NotFound
from impasto.jobs.events import Glance, Thumbnail
from impasto.jobs.records import Job

KEEP_ALIVE: Final = 15.0  # seconds of silence after which a comment is sent
_COMMENT: Final = b": still here\n\n"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: nginx is not to hold it back


@dataclass(frozen=True, slots=True)
class Previews:
    """Which previews of a job are sent: so many, spread evenly over its steps."""

    count: int

    def due(self, sent: int, shown: Thumbnail, glance: Glance) -> bool:
        """Whether ``shown`` is the next one, after ``sent`` of them."""
        total = glance.progress.get("total")
        if sent >= self.count or not isinstance(total, int):
            return False
        return shown.step * (self.count + 1) >= total * (sent + 1)


class ImageStream(StreamingResponse):
    """The events of one job, from now to its end.

    Args:
        job: Just accepted.
        answers: Write what a job became.
        kind: What the events' names begin with: ``image_generation`` or ``image_edit``.
        previews: How many are sent.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, answers: Answers, kind: str, previews: int) -> None:
        super().__init__((), headers=_HEADERS | {"x-request-id": job.id})
        self._job = job
        self._answers = answers
        self._kind = kind
        self._previews = Previews(previews)
        self._told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; then nothing is left."""
        service = self._answers.service
        with service.listeners.joined(self._job.id) as listener:
            self.body_iterator = self._chunks(listener)
            try:
                await super().__call__(scope, receive, send)
            except ClientDisconnect:
                pass
            except asyncio.CancelledError:  # the service stops: it was not the client that went
                service.store.drop(self._job.id, withdraw=False)
                raise
        if not self._told:
            await run_in_threadpool(service.store.drop, self._job.id)

    async def _chunks(self, listener: Listener) -> AsyncIterator[bytes]:
        ends = time.monotonic() + self._answers.service.settings.openai_timeout
        sent = 0
        while True:
            left = ends - time.monotonic()
            news = await listener.news(max(0.0, min(KEEP_ALIVE, left)))
            glance = listener.glance
            if self._answers.service.listeners.closed and not (glance and glance.ended):
                self._told = True
                yield await run_in_threadpool(self._stopping)
                return
            if listener.over or (glance and glance.ended) or left <= 0:
                break
            if not news:
                yield _COMMENT
            for shown in listener.previews:
                if glance and shown.index == 0 and self._previews.due(sent, shown, glance):
                    yield self._partial(shown, sent)
                    sent += 1
        self._told = True
        for chunk in await run_in_threadpool(self._end):
            yield chunk

    def _partial(self, shown: Thumbnail, index: int) -> bytes:
        more = {"b64_json": shown.image, "partial_image_index": index, "output_format": "jpeg"}
        return self._event("partial_image", self._answers.shape(self._job) | more)

    def _end(self) -> list[bytes]:
        """Return the finished pictures, or why there are none; in a thread."""
        try:
            job = self._answers.service.store.get(self._job.id)
            answer = self._answers.finished(job)
        except JobFailed as error:
            return [_error(error)]
        except NotFound:
            return [_error(JobFailed("The prediction is gone."))]
        shape = self._answers.shape(job) | {"usage": answer["usage"]}
        return [self._event("completed", shape | picture) for picture in answer["data"]]

    def _stopping(self) -> bytes:
        """Leave the job to a request that comes again; in a thread."""
        self._answers.service.store.drop(self._job.id, withdraw=False)
        return _error(JobFailed("The service is stopping; send the request again.", code="unavailable", status=503))

    def _event(self, ending: str, values: dict[str, Any]) -> bytes:
        name = f"{self._kind}.{ending}"
        data = {"type": name, "created_at": int(time.time())} | values
        return format_sse_event(event=name, data_str=json.dumps(data))


def _error(error: JobFailed) -> bytes:
    body = {"type": "error"} | error_body(error.status, str(error), error.param, error.code)
    return format_sse_event(event="error", data_str=json.dumps(body))
