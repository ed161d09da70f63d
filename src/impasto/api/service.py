"""What every route needs at hand: settings, the stores, and the waiting room.

Knows how to get these from a request. Knows nothing of any route.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from impasto.api.auth import KeyCheck
from impasto.api.finished import FinishedAnswers
from impasto.api.limits import DiskRoom
from impasto.api.listening import Listeners
from impasto.api.pictures import PictureSource
from impasto.api.room import BodyRoom
from impasto.api.shared_reads import SharedReads
from impasto.api.traffic import Traffic
from impasto.api.waiting import Changes
from impasto.config import Settings
from impasto.fetch.post import Poster
from impasto.jobs.events import JobGlances
from impasto.jobs.history import History
from impasto.jobs.keys import KeyStore
from impasto.jobs.limits import Limits
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore
from impasto.jobs.uploads import UploadStore
from impasto.jobs.workers import WorkerReports


@dataclass(frozen=True, slots=True)
class Service:
    """The parts behind one application; made once by ``create_app``."""

    settings: Settings
    store: JobStore
    outputs: OutputStore
    key_check: KeyCheck
    changes: Changes
    pictures: PictureSource
    readers: CapacityLimiter  # threads that read bodies, pictures among them
    writers: CapacityLimiter  # threads that make jobs: they wait for the store's one write lock, and polls must not
    keys: KeyStore
    poster: Poster | None  # sends webhooks; None: this server sends none
    uploads: UploadStore
    history: History
    finished: FinishedAnswers  # with base64
    reads: SharedReads  # of jobs, for polls
    glances: JobGlances
    listeners: Listeners  # requests that follow jobs
    reports: WorkerReports
    traffic: Traffic  # what this process counted
    bodies: BodyRoom  # for large request bodies
    limits: Limits  # of keys without their own
    disk: DiskRoom
    askers: CapacityLimiter  # threads of "are you ready": a database that hangs holds these and no others


async def service_of(request: Request) -> Service:
    """Return the parts of the application that took ``request``; on the loop: FastAPI gives plain ones a thread."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(service_of)]
