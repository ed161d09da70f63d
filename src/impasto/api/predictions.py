"""Reading a prediction: ``GET /api/v2|v3/predictions/{id}``, with and without ``/result``.

Knows ids and keys, and that a reader may wait for the end. Never limited in rate: several clients give a running job
up at the first refusal of a poll.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from impasto.api.auth import CallerDep
from impasto.api.hold import listening
from impasto.api.models import VERSIONS
from impasto.api.patience import patiently
from impasto.api.schemas import Envelope, responses
from impasto.api.service import ServiceDep
from impasto.api.view import Links, answer, reads_files
from impasto.jobs.states import TERMINAL

MAX_WAIT: Final = 60  # seconds
Wait = Annotated[
    float,
    Query(ge=0, le=MAX_WAIT, allow_inf_nan=False, description="Seconds to wait for the end before answering."),
]


async def result(prediction_id: str, request: Request, service: ServiceDep, key: CallerDep, wait: Wait = 0) -> Response:
    """Return the prediction, at its end or after ``wait``; another key's is "not found", like one that never was."""
    links, patience = Links.of(request, service), service.settings.database_patience
    read = partial(service.reads.get, prediction_id, key.id)
    job = await patiently(patience, read)
    if wait and job.status not in TERMINAL:
        async with listening(request) as hang_up:
            await service.listeners.ended(job.id, wait, hang_up)
        job = await patiently(patience, read)
    return await run_in_threadpool(answer, job, service, links) if reads_files(job) else answer(job, service, links)


def router() -> APIRouter:
    """Return all spellings of the route."""
    routes = APIRouter(tags=["predictions"])
    for version, ending in itertools.product(VERSIONS, ("/result", "")):
        routes.add_api_route(
            f"/api/{version}/predictions/{{prediction_id}}{ending}",
            result,
            methods=["GET"],
            summary="Read a prediction",
            operation_id=f"read_{version}{ending.replace('/', '_')}",
            response_model=Envelope,
            responses=responses(400, 401, 404),
        )
    return routes
