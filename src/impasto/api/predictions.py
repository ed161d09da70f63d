"""Reading a prediction: ``GET /api/v2|v3/predictions/{id}``, with and without ``/result``.

Knows ids and keys. Never limited in rate: several clients give a running job up at the first refusal of a poll.
"""

from __future__ import annotations

import itertools

from fastapi import APIRouter, Request
from fastapi.responses import Response

from impasto.api.auth import CallerDep
from impasto.api.models import VERSIONS
from impasto.api.schemas import Envelope, responses
from impasto.api.service import ServiceDep
from impasto.api.view import Links, answer
from impasto.errors import NotFound
from impasto.jobs.records import is_job_id


def result(prediction_id: str, request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Return the prediction; another key's is "not found", like one that never was."""
    if not is_job_id(prediction_id):
        raise NotFound("no such prediction")
    try:
        job = service.store.get(prediction_id, key.id)
    except NotFound:
        raise NotFound("no such prediction") from None
    return answer(job, service, Links.of(request, service))


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
            responses=responses(401, 404),
        )
    return routes
