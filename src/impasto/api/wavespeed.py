"""Submitting, in the hosted service's dialect: ``POST /api/v2/{model}`` and ``/api/v3/{model}``.

Knows the routes and the order of things: key, model, body, job, and then the wait of a synchronous client. Knows
nothing of single fields (``models.py``), of how a job is made (``intake.py``) or of the answer's form (``view.py``).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from impasto.api.auth import CallerDep
from impasto.api.body import parse_object, read_body
from impasto.api.hold import HangUp, finished, listening
from impasto.api.intake import MAX_KEY_CHARS, Draft, accepted, idempotency_key
from impasto.api.models import MODELS, VERSIONS, ServedModel, find_served
from impasto.api.schemas import Envelope, responses
from impasto.api.service import Service, ServiceDep
from impasto.api.view import Links, answer, prediction, success, timed_out
from impasto.api.webhooks import QUERY_PARAMETER, Webhook
from impasto.errors import NotFound
from impasto.jobs.keys import Key
from impasto.jobs.records import Job
from impasto.jobs.states import TERMINAL

Endpoint = Callable[..., Awaitable[Response]]
GONE = 499  # nobody reads this answer

_KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same text with the same body is the same prediction; with another body it is refused.",
    "schema": {"type": "string", "maxLength": MAX_KEY_CHARS},
}


def router() -> APIRouter:
    """Return one route for each model and version, and last the one for other spellings and unknown models."""
    routes = APIRouter(tags=["submit"])
    for version in VERSIONS:
        for model in MODELS:
            routes.add_api_route(
                f"/api/{version}/{model.id}",
                _submit_to(model),
                methods=["POST"],
                summary=f"Submit to {model.id}",
                description=model.description,
                operation_id=f"submit_{version}_{model.id}",
                response_model=Envelope,
                responses=responses(400, 401, 409, 413, 429),
                openapi_extra={
                    "parameters": [_KEY_HEADER, QUERY_PARAMETER],
                    "requestBody": {"required": True, "content": {"application/json": {"schema": model.schema()}}},
                },
            )
        rest = f"/api/{version}/{{path:path}}"
        routes.add_api_route(rest, other_path, methods=["GET", "POST"], include_in_schema=False)
    return routes


async def other_path(request: Request, path: str, service: ServiceDep, key: CallerDep) -> Response:
    """Take a model's id in any case and with slashes around it; else say what there is."""
    model = find_served(path)
    if request.method == "GET":
        raise HTTPException(405, headers={"Allow": "POST"}) if model else HTTPException(404)
    if model is None:
        known = ", ".join(served.id for served in MODELS)
        raise NotFound(f"no model {path[:100]!r} here; there are: {known}")
    return await _submit(model, request, service, key)


def _submit_to(model: ServedModel) -> Endpoint:
    """Return the route of one model."""

    async def submit(request: Request, service: ServiceDep, key: CallerDep) -> Response:
        return await _submit(model, request, service, key)

    return submit


async def _submit(model: ServedModel, request: Request, service: Service, key: Key) -> Response:
    repeat, links = idempotency_key(request), Links.of(request, service)

    async def drafted() -> Draft:
        body = await read_body(request, service.settings.max_body_bytes)

        def read() -> Draft:
            fields = parse_object(body, request.headers.get("content-type", ""))
            webhook = Webhook.read(request.url.query, fields, links, service)
            return Draft.read(model, fields, service, repeat, webhook)

        return await to_thread.run_sync(read, limiter=service.readers)

    async with AsyncExitStack() as room:
        await room.enter_async_context(service.bodies.taken(request))
        draft = await drafted()
        async with listening(request) as hang_up:
            job, sync = await accepted(draft, service, key.id, hang_up), draft.sync
            del draft  # its pictures are files now, and a held request holds no memory for them
            await room.aclose()
            if job is None:
                return Response(status_code=GONE)
            return await (_held if sync else _at_once)(service, job, links, hang_up)


async def _at_once(service: Service, job: Job, links: Links, hang_up: HangUp) -> Response:
    """Answer with the job as it is. It goes on if its client has gone, which will find it by sending it again."""
    if hang_up.done():
        await run_in_threadpool(service.store.drop, job.id, withdraw=False)
        return Response(status_code=GONE)
    return await run_in_threadpool(answer, job, service, links) if job.outputs else answer(job, service, links)


async def _held(service: Service, job: Job, links: Links, hang_up: HangUp) -> Response:
    """Answer when the job has ended, or at the limit."""
    began, limit = time.monotonic(), service.settings.sync_timeout
    last = await finished(service, job, hang_up)
    if last is None:
        return Response(status_code=GONE)
    if last.status in TERMINAL:
        return await run_in_threadpool(answer, last, service, links)
    waited = time.monotonic() - began
    return success(timed_out(prediction(last, service, links), limit if waited >= limit else round(waited, 1)))
