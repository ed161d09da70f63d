"""Holding a synchronous request: until its job has ended, its client has hung up, or the time is over.

Knows when a client hangs up and what becomes of its job then. Knows nothing of bodies or answers. Many clients give up
after ten seconds and send the same request again; what they left is told to the store, where it is found again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from impasto.api.patience import patiently
from impasto.api.service import Service
from impasto.errors import Unavailable
from impasto.jobs.records import Job
from impasto.jobs.states import TERMINAL

HangUp = asyncio.Task[None]  # ends when the client has gone
# How long after a request came again the end of its first connection may be noticed: this share of what its client
# has waited for that one, between these seconds.
TWIN_SHARE: Final = 0.2
TWIN_SECONDS: Final = (0.3, 2.0)
TWIN_PAUSE: Final = 0.03


@asynccontextmanager
async def listening(request: Request) -> AsyncIterator[HangUp]:
    """Watch for the client to hang up, at once and whatever else is waited for; begin after the body was read."""
    task = asyncio.create_task(_hung_up(request))
    try:
        yield task
    finally:
        task.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def twin_settled(service: Service, key_id: str, body_hash: str) -> None:
    """Wait a moment where another synchronous request with the same body is still held.

    It may be this client's own, whose end another process, or this one, is about to notice: then its job is joined.
    Two requests that really run side by side make two jobs, the second this little later.
    """
    began, (least, most) = time.monotonic(), TWIN_SECONDS
    while (age := await run_in_threadpool(service.store.held_for, key_id, body_hash)) is not None:
        if time.monotonic() - began > min(max(least, TWIN_SHARE * age), most):
            break
        await asyncio.sleep(TWIN_PAUSE)


async def finished(service: Service, job: Job, hang_up: HangUp, seconds: float | None = None) -> Job | None:
    """Return the job once it has ended, or as it is at the end of the wait or when the service stops.

    ``None`` if the client hung up: a job that had not begun is withdrawn then; one that began goes on. The wait is
    ``seconds``, or the setting ``sync_timeout``. Where the database is away for longer than a poll would wait for it,
    the job is returned as it was: it is accepted, and its client must learn where to read it.
    """
    settings, read = service.settings, partial(service.reads.get, job.id, job.key_id)
    deadline = time.monotonic() + (settings.sync_timeout if seconds is None else seconds)
    try:
        while True:
            watch = service.changes.watch()
            try:
                job = await patiently(settings.database_patience, read)
            except Unavailable:
                return job
            if hang_up.done():
                await run_in_threadpool(service.store.drop, job.id)
                return None
            left = deadline - time.monotonic()
            if job.status in TERMINAL or left <= 0:
                return job
            await service.changes.next(watch, left, hang_up)
    except asyncio.CancelledError:  # the service stops: its client may not get this answer, and can send again
        service.store.drop(job.id, withdraw=False)
        return job
