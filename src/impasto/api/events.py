"""Following a prediction: ``GET /api/v2|v3/predictions/{id}/events``, server-sent events.

Knows the stream's form: ``status`` with the prediction at each change of its state, ``progress`` and ``preview`` while
it runs, comments that keep the connection open; the end of the prediction ends it. Knows nothing of how news are found
(``listening.py``). A client that comes back with ``Last-Event-ID`` is not told the same state twice.

Source of the form: the HTML standard, section 9.2, server-sent events.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from impasto.api.auth import CallerDep
from impasto.api.listening import Listener
from impasto.api.models import VERSIONS
from impasto.api.patience import patiently
from impasto.api.schemas import responses
from impasto.api.service import Service, ServiceDep
from impasto.api.view import Links, prediction
from impasto.api.waiting import PATIENCE
from impasto.errors import NotFound, Unavailable
from impasto.jobs.events import Glance
from impasto.jobs.records import Job, is_job_id
from impasto.jobs.states import Status

KEEP_ALIVE: Final = 15.0  # seconds of silence after which a comment is sent
RETRY: Final = 1000  # milliseconds after which a client that lost the stream comes back
ALL_TOLD: Final = 204  # tells an EventSource not to come back
_COMMENT: Final = b": still here\n\n"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: nginx is not to hold it back


class EventStream(StreamingResponse):
    """The events of one prediction, from its present state to its end."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, service: Service, links: Links, told: str | None) -> None:
        super().__init__((), headers=_HEADERS)  # the events begin when it is sent
        self._job = job
        self._service = service
        self._links = links
        self._told = told  # id of the last state that the client knows
        self._steps: dict[str, Any] = {}
        self._shown: dict[int, tuple[int, int]] = {}  # attempt and step of the last preview of each picture

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the prediction ends, the client goes or the service stops; then nothing is left."""
        with self._service.listeners.joined(self._job.id) as listener:
            self.body_iterator = self._chunks(listener)
            await super().__call__(scope, receive, send)

    async def _chunks(self, listener: Listener) -> AsyncIterator[bytes]:
        yield f"retry: {RETRY}\n\n".encode()
        behind = False  # the state is not told yet: it could not be read, or moved on while it was
        while True:
            if not await listener.news(PATIENCE if behind else KEEP_ALIVE) and not behind:
                yield _COMMENT
            if listener.over:
                return
            glance = listener.glance
            if glance is None:
                continue
            if str(glance.seq) != self._told:
                data = await self._status(glance)
                behind = data is None
                if data is None:
                    continue
                self._told = str(glance.seq)
                yield format_sse_event(event="status", data_str=data, id=self._told)
            if glance.ended:
                return
            if glance.status is Status.PROCESSING:
                for chunk in self._running(glance, listener):
                    yield chunk

    async def _status(self, glance: Glance) -> str | None:
        """Return the prediction as JSON; ``None`` if it is not in the state of ``glance`` any more, or gone."""
        try:
            job = await run_in_threadpool(self._service.store.get, self._job.id)
            if job.status is not glance.status:
                return None
            shown = await run_in_threadpool(prediction, job, self._service, self._links)
        except (NotFound, Unavailable):
            return None
        return shown.model_dump_json(by_alias=True, exclude_none=True)

    def _running(self, glance: Glance, listener: Listener) -> list[bytes]:
        """Return what is new about a running job."""
        chunks: list[bytes] = []
        steps = {name: glance.progress[name] for name in ("step", "total", "sigma") if name in glance.progress}
        if steps and steps != self._steps:
            self._steps = steps
            chunks.append(format_sse_event(event="progress", data_str=json.dumps(steps)))
        for thumbnail in listener.previews:
            now = (glance.attempt, thumbnail.step)
            if self._shown.get(thumbnail.index) != now:
                self._shown[thumbnail.index] = now
                data = {"image": thumbnail.image, "index": thumbnail.index, "content_type": "image/jpeg"}
                chunks.append(format_sse_event(event="preview", data_str=json.dumps(data)))
        return chunks


async def events(
    prediction_id: str,
    request: Request,
    service: ServiceDep,
    key: CallerDep,
    last_event_id: Annotated[str | None, Header(description="The last id that the client was told.")] = None,
) -> Response:
    """Follow the prediction; another key's is "not found". 204 if the client knows its end already."""
    find = partial(run_in_threadpool, _found, prediction_id, key.id, service)
    job, glance = await patiently(service.settings.database_patience, find)
    if glance.ended and last_event_id == str(glance.seq):
        return Response(status_code=ALL_TOLD)
    return EventStream(job, service, Links.of(request, service), last_event_id)


def _found(prediction_id: str, key_id: str, service: Service) -> tuple[Job, Glance]:
    """Return the caller's job; in a thread."""
    try:
        if not is_job_id(prediction_id):
            raise NotFound("no such prediction")
        return service.store.get(prediction_id, key_id), service.glances.look([prediction_id])[prediction_id]
    except (NotFound, KeyError):
        raise NotFound("no such prediction") from None


def router() -> APIRouter:
    """Return the route in both versions."""
    routes = APIRouter(tags=["predictions"])
    stream = {"description": "A stream of events.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    ended = {"description": "The client knows the end already: nothing will follow."}
    for version in VERSIONS:
        routes.add_api_route(
            f"/api/{version}/predictions/{{prediction_id}}/events",
            events,
            methods=["GET"],
            summary="Follow a prediction",
            operation_id=f"follow_{version}",
            response_class=Response,
            responses={200: stream, 204: ended, **responses(401, 404)},
        )
    return routes
