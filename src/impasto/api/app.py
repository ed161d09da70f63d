"""Putting the HTTP service together.

Knows which parts there are. Knows nothing of what any of them does; no route is written here but ``/health``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI

from impasto.api import errors, files, predictions, wavespeed
from impasto.api.auth import KeyCheck
from impasto.api.pictures import PictureSource
from impasto.api.service import Service
from impasto.api.waiting import Changes
from impasto.config import Settings
from impasto.jobs.events import ChangeWatcher
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore

READERS = 4  # bodies read at once, in threads of their own: decoding pictures must not hold up polls
THREADS = 16  # for all blocking work; fewer than the store has connections, so that none waits for one


def create_app(settings: Settings, store: JobStore, keys: KeyStore, outputs: OutputStore) -> FastAPI:
    """Return the application; it serves at once, whatever the workers do.

    No cross-origin access is allowed and no page is served: every answer but a picture needs the key.
    """
    changes, pictures = Changes(ChangeWatcher(store)), PictureSource.of(settings, outputs)
    service = Service(settings, store, outputs, KeyCheck(keys), changes, pictures, CapacityLimiter(READERS))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        await service.changes.close()

    app = FastAPI(
        title="Impasto",
        description="Pictures from text with SDXL and LoRAs.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # the stock pages load scripts from other hosts
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    app.add_api_route("/health", health, methods=["GET"], tags=["health"])
    # The first route that fits answers: the submit routes end in a catch-all, so they come last.
    for routes in (files.router(), predictions.router(), wavespeed.router()):
        app.include_router(routes)
    return app


async def health() -> dict[str, str]:
    """Say that the process answers; it asks nothing of the store or the workers."""
    return {"status": "ok"}
