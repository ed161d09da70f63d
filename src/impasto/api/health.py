"""Is the service there, and can it work: ``GET /healthz`` and ``GET /readyz``.

Knows what work needs: a database that answers, and a worker that was heard lately. Neither route needs a key, and
neither says more than that.
"""

from __future__ import annotations

from typing import Final, Literal

from anyio import move_on_after, to_thread
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from impasto.api.service import Service, ServiceDep
from impasto.errors import Unavailable
from impasto.jobs.workers import SEEN_SECONDS

ANSWER_SECONDS: Final = 2.0  # the database is given
OK: Final = "ok"


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = OK


class Readiness(BaseModel):
    """Whether work can be done, and what is missing."""

    status: Literal["ready", "not ready"]
    checks: dict[str, str] = Field(description='By name: "ok", or what is wrong.')


async def health() -> Health:
    """Say that the process answers; it asks nothing of the store or the workers."""
    return Health()


async def ready(service: ServiceDep) -> JSONResponse:
    """Say whether a request sent now would be worked on; 503 with the reasons otherwise."""
    checks = await _database_and_workers(service)
    if service.listeners.closed:
        checks["service"] = "is shutting down"
    good = all(problem == OK for problem in checks.values())
    body = Readiness(status="ready" if good else "not ready", checks=checks)
    return JSONResponse(body.model_dump(), 200 if good else 503, headers={"Cache-Control": "no-store"})


async def _database_and_workers(service: Service) -> dict[str, str]:
    """Count the workers, in a bounded time: a database that hangs holds up one thread and no caller."""
    seen: int | None = None
    with move_on_after(ANSWER_SECONDS):
        try:
            seen = await to_thread.run_sync(service.reports.seen, abandon_on_cancel=True, limiter=service.askers)
        except Unavailable:
            return {"database": "cannot answer", "workers": "unknown"}
    if seen is None:
        return {"database": f"has not answered for {ANSWER_SECONDS:g} seconds", "workers": "unknown"}
    missing = f"none was heard in the last {SEEN_SECONDS:g} seconds: start one, or wait until it has loaded its model"
    return {"database": OK, "workers": OK if seen else missing}


def router() -> APIRouter:
    """Return the routes; ``/health`` is the old name of ``/healthz``."""
    routes = APIRouter(tags=["health"])
    for path in ("/healthz", "/health"):
        routes.add_api_route(path, health, methods=["GET"], summary="Does the process answer", name=path[1:])
    not_ready = {"model": Readiness, "description": "Not now; the checks say why."}
    routes.add_api_route(
        "/readyz",
        ready,
        methods=["GET"],
        summary="Can it work",
        response_model=Readiness,
        responses={503: not_ready},
    )
    return routes
