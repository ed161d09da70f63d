"""Putting the HTTP service together.

Knows which parts there are. Knows nothing of what any of them does; no route is written here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI

from impasto.api import (
    account,
    catalog,
    errors,
    events,
    files,
    health,
    history,
    metrics,
    openai,
    playground,
    predictions,
    uploads,
    wavespeed,
    webhooks,
)
from impasto.api.auth import KeyCheck
from impasto.api.cleaning import cleaning
from impasto.api.delivery import Deliverer, poster_of
from impasto.api.finished import FinishedAnswers
from impasto.api.listening import Listeners
from impasto.api.pictures import PictureSource
from impasto.api.service import Service
from impasto.api.traffic import Counting, Traffic
from impasto.api.waiting import Changes
from impasto.config import Settings
from impasto.jobs.events import ChangeWatcher, JobGlances
from impasto.jobs.history import History
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore
from impasto.jobs.uploads import UploadStore
from impasto.jobs.workers import WorkerReports

READERS = 4  # bodies read at once, in threads of their own: decoding pictures must not hold up polls
ASKERS = 2  # questions to a database at once, whether it is there
THREADS = 16  # for all blocking work; fewer than the store has connections, so that none waits for one


def create_app(settings: Settings, store: JobStore, keys: KeyStore, outputs: OutputStore) -> FastAPI:
    """Return the application; it serves at once, whatever the workers do.

    No cross-origin access is allowed: the page at ``/`` is served from here, too, and signs its requests with a key.
    """
    received = UploadStore(store.engine, outputs, kept=settings.upload_seconds, quota=settings.upload_quota)
    past = History(store.engine, outputs)
    changes, pictures = Changes(ChangeWatcher(store)), PictureSource.of(settings, outputs, received)
    poster, glances = poster_of(settings), JobGlances(store.engine)
    service = Service(
        settings,
        store,
        outputs,
        KeyCheck(keys),
        changes,
        pictures,
        CapacityLimiter(READERS),
        keys,
        poster,
        uploads=received,
        history=past,
        finished=FinishedAnswers(settings.base64_cache_bytes),
        glances=glances,
        listeners=Listeners(changes, glances),
        reports=WorkerReports(store.engine),
        traffic=Traffic(),
        askers=CapacityLimiter(ASKERS),
    )
    deliverer = Deliverer.of(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        if deliverer:
            deliverer.start()
        async with cleaning(service):
            yield
        if deliverer:
            await to_thread.run_sync(deliverer.stop)
        service.listeners.close()
        await service.changes.close()

    app = FastAPI(
        title="Impasto",
        description="Pictures from text with SDXL and LoRAs.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # the stock pages load scripts from other hosts
        redoc_url=None,
    )
    app.state.service, app.state.deliverer = service, deliverer
    errors.install(app)
    app.add_middleware(Counting, traffic=service.traffic)
    app.include_router(health.router())
    app.include_router(metrics.router(settings))
    app.include_router(events.router())
    # The first route that fits answers: the submit routes end in a catch-all, so they come last.
    for routes in (
        playground.router(),
        files.router(),
        uploads.router(),
        webhooks.router(),
        catalog.router(),
        account.router(),
        predictions.router(),
        history.router(),
        openai.router(),
        wavespeed.router(),
    ):
        app.include_router(routes)
    return app
