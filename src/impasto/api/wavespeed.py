"""Submitting, in the hosted service's dialect: ``POST /api/v2/{model}`` and ``/api/v3/{model}``.

Knows the order of things: key, model, body, pictures, job, and then the wait of a synchronous client. Knows nothing
of single fields (``models.py``) or of the answer's form (``view.py``).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from impasto.api.auth import CallerDep
from impasto.api.body import parse_object, read_body
from impasto.api.models import MODELS, VERSIONS, ServedModel
from impasto.api.schemas import Envelope, responses
from impasto.api.service import Service, ServiceDep
from impasto.api.submission import Submission
from impasto.api.view import Links, answer, prediction, success, timed_out
from impasto.errors import InvalidInput, NotFound
from impasto.jobs.keys import Key
from impasto.jobs.records import Job
from impasto.jobs.states import TERMINAL

Endpoint = Callable[..., Awaitable[Response]]


def router() -> APIRouter:
    """Return one route for each model and version, and last the answer for models that are not served."""
    routes = APIRouter(tags=["submit"])
    for version in VERSIONS:
        for model in MODELS:
            routes.add_api_route(
                f"/api/{version}/{model.id}",
                _submit(model),
                methods=["POST"],
                summary=f"Submit to {model.id}",
                description=model.description,
                operation_id=f"submit_{version}_{model.id}",
                response_model=Envelope,
                responses=responses(400, 401, 413, 429),
                openapi_extra={
                    "requestBody": {"required": True, "content": {"application/json": {"schema": model.schema()}}}
                },
            )
        rest = f"/api/{version}/{{path:path}}"
        routes.add_api_route(rest, not_served, methods=["GET", "POST"], include_in_schema=False)
    return routes


async def not_served(request: Request, path: str, key: CallerDep) -> Response:
    """Say what there is, in place of a path that fitted no other route."""
    models = [model.id for model in MODELS]
    if request.method == "GET":
        raise HTTPException(405, headers={"Allow": "POST"}) if path in models else HTTPException(404)
    raise NotFound(f"no model {path[:100]!r} here; there are: {', '.join(models)}")


def _submit(model: ServedModel) -> Endpoint:
    """Return the route of one model."""

    async def submit(request: Request, service: ServiceDep, key: CallerDep) -> Response:
        if request.query_params.get("webhook"):
            raise InvalidInput("webhook", "is not available yet: poll the prediction's urls.get")
        body = await read_body(request, service.settings.max_body_bytes)
        submission = await to_thread.run_sync(_read, model, body, service, limiter=service.readers)
        pictures = await service.pictures.fetched(submission.pictures)
        job = await run_in_threadpool(_create, submission, pictures, key, service)
        links = Links.of(request, service)
        if submission.sync:
            return await _finished(request, service, job, links)
        return answer(job, service, links)

    return submit


def _read(model: ServedModel, body: bytes, service: Service) -> Submission:
    """Check the body; in a thread, because pictures in it are decoded."""
    return Submission.read(model, parse_object(body), refiner=service.settings.refiner is not None)


def _create(submission: Submission, pictures: Mapping[str, bytes], key: Key, service: Service) -> Job:
    """Store the pictures and make the job; in a thread, because both may take long.

    The files are there before the row that names them, and go again if the row cannot be written.
    """
    stored: dict[str, str] = {}
    with ExitStack() as undo:
        for name, png in pictures.items():
            stored[name] = service.outputs.put_input(png)
            undo.callback(service.outputs.delete, [stored[name]])
        job = service.store.create(submission.to_job(key.id, stored), service.settings.max_queued)
        undo.pop_all()
    return job


async def _finished(request: Request, service: Service, job: Job, links: Links) -> Response:
    """Answer when the job has ended, or at the limit, or stop when the client has hung up: the job goes on."""
    limit = service.settings.sync_timeout
    deadline = time.monotonic() + limit
    while True:
        watch = service.changes.watch()
        job = await run_in_threadpool(service.store.get, job.id, job.key_id)
        if job.status in TERMINAL:
            return await run_in_threadpool(answer, job, service, links)
        left = deadline - time.monotonic()
        if left <= 0:
            return success(timed_out(prediction(job, service, links), limit))
        if await request.is_disconnected():
            return Response(status_code=499)
        await service.changes.next(watch, left)
