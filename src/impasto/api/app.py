"""Putting the HTTP service together.

Knows which parts there are. Knows nothing of what any of them does; no route is written here.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI

from impasto.api import (
    account,
    catalog,
    edge,
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
from impasto.api.limits import DiskRoom, limits_of
from impasto.api.listening import Listeners
from impasto.api.pictures import PictureSource
from impasto.api.room import BodyRoom
from impasto.api.service import Service
from impasto.api.shared_reads import SharedReads
from impasto.api.spelling import Spelling
from impasto.api.tracing import Tracing
from impasto.api.traffic import Counting, Traffic
from impasto.api.waiting import Changes
from impasto.audit import AuditLog
from impasto.config import Settings
from impasto.jobs.events import ChangeWatcher, JobGlances
from impasto.jobs.history import History
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.reading import JobReader
from impasto.jobs.store import JobStore
from impasto.jobs.uploads import UploadStore
from impasto.jobs.workers import WorkerReports

READERS = 4  # bodies read at once, in threads of their own: decoding pictures must not hold up polls
WRITERS = 4  # jobs made at once: SQLite makes one after another, and those that wait must leave threads to polls
ASKERS = 2  # questions to a database at once, whether it is there
THREADS = 16  # for all blocking work; fewer than the store has connections, so that none waits for one


def create_app(settings: Settings, store: JobStore, keys: KeyStore, outputs: OutputStore) -> FastAPI:
    """Return the application; it serves at once, whatever the workers do.

    No cross-origin access is allowed unless the settings name origins: the page at ``/`` is served from here, too, and
    signs its requests with a key.
    """
    service = _service(settings, store, keys, outputs)
    deliverer = Deliverer.of(service)

    app = FastAPI(
        title="Impasto",
        description="Pictures from text with SDXL and LoRAs.",
        version="1",
        lifespan=_lifespan,
        docs_url=None,  # the stock pages load scripts from other hosts
        redoc_url=None,
    )
    app.state.service, app.state.deliverer = service, deliverer
    errors.install(app)
    app.add_middleware(Counting, traffic=service.traffic)
    app.add_middleware(Tracing, audit=AuditLog(settings.audit_log) if settings.audit_log else None)
    app.add_middleware(Spelling)
    edge.install(app, settings)
    _include_routes(app, settings)
    return app


def _service(settings: Settings, store: JobStore, keys: KeyStore, outputs: OutputStore) -> Service:
    """Make what the routes work with."""
    limits = limits_of(settings)
    received = UploadStore(
        store.engine, outputs, kept=settings.upload_seconds, quota=settings.upload_quota, limits=limits
    )
    past = History(store.engine, outputs)
    changes, pictures = Changes(ChangeWatcher(store)), PictureSource.of(settings, outputs, received)
    poster, glances = poster_of(settings), JobGlances(store.engine)
    return Service(
        settings,
        store,
        outputs,
        KeyCheck(keys),
        changes,
        pictures,
        CapacityLimiter(READERS),
        CapacityLimiter(WRITERS),
        keys,
        poster,
        uploads=received,
        history=past,
        finished=FinishedAnswers(settings.base64_cache_bytes),
        reads=SharedReads(JobReader(store.engine).read),
        glances=glances,
        listeners=Listeners(changes, glances),
        reports=WorkerReports(store.engine),
        traffic=Traffic(),
        askers=CapacityLimiter(ASKERS),
        bodies=BodyRoom(settings.max_body_bytes),
        limits=limits,
        disk=DiskRoom.of(settings),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start what goes on beside the requests, and end it when the service stops."""
    service, deliverer = app.state.service, app.state.deliverer
    to_thread.current_default_thread_limiter().total_tokens = THREADS
    if not gc.get_freeze_count():  # what start-up made stays; walking it at each full collection held all up
        gc.collect()
        gc.freeze()
    if deliverer:
        deliverer.start()
    async with cleaning(service):
        yield
    if deliverer:
        await to_thread.run_sync(deliverer.stop)
    service.listeners.close()
    await service.changes.close()


def _include_routes(app: FastAPI, settings: Settings) -> None:
    """Include every dialect's routes; the first that fits answers."""
    app.include_router(predictions.router())  # polls are nearly all requests, and routers are tried in turn
    app.include_router(health.router())
    app.include_router(metrics.router(settings))
    app.include_router(events.router())
    # The submit routes end in a catch-all, so they come last.
    for routes in (
        playground.router(),
        files.router(),
        uploads.router(),
        webhooks.router(),
        catalog.router(),
        account.router(),
        history.router(),
        openai.router(),
        wavespeed.router(),
    ):
        app.include_router(routes)
