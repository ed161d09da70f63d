"""Following jobs: any number of requests wait for news of theirs, and one look at the store serves them all.

Knows who waits for which job, and what each was told last. Knows nothing of HTTP. Nobody holds a thread: one task looks
on while somebody listens, at the store's changes and at least twice a second, and at most ten times a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from fastapi.concurrency import run_in_threadpool

from impasto.api.waiting import PATIENCE, Changes
from impasto.errors import Unavailable
from impasto.jobs.events import Glance, JobGlances, Thumbnail

log = logging.getLogger(__name__)

PAUSE: Final = 0.1  # seconds between two looks: what happens in between is told at once


class Listener:
    """One request that follows one job."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.glance: Glance | None = None  # how the job stands; None: not looked yet, or it is gone
        self.previews: tuple[Thumbnail, ...] = ()  # what it shows
        self.over = False  # nothing more will be told: the job is gone, or the service ends
        self._news = asyncio.Event()

    async def news(self, seconds: float, *others: asyncio.Task[None]) -> bool:
        """Wait until there is something new, one of ``others`` is done, or ``seconds`` are over; tell if there is."""
        waiting = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait({waiting, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        new = self._news.is_set()
        self._news.clear()
        return new

    def tell(self, glance: Glance | None, previews: tuple[Thumbnail, ...]) -> None:
        """Note how the job stands, and wake the request if that is new."""
        if glance is None:
            self.end()
        elif glance != self.glance:
            self.glance, self.previews = glance, previews
            self._news.set()

    def end(self) -> None:
        """Let the request go."""
        self.over = True
        self._news.set()


class Listeners:
    """All requests of this process that follow jobs."""

    def __init__(self, changes: Changes, glances: JobGlances) -> None:
        self._changes = changes
        self._glances = glances
        self._listeners: set[Listener] = set()
        self._looking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._previews: dict[str, tuple[tuple[int, int], tuple[Thumbnail, ...]]] = {}  # by job, with their number
        self.closed = False

    def __len__(self) -> int:
        return len(self._listeners)

    @contextmanager
    def joined(self, job_id: str) -> Iterator[Listener]:
        """Follow a job for as long as the block lasts; the first news come within ``PAUSE``."""
        listener = Listener(job_id)
        self._listeners.add(listener)
        self._wake.set()
        if self.closed:
            listener.end()
        elif self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_on())
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    async def ended(self, job_id: str, seconds: float, hang_up: asyncio.Task[None]) -> None:
        """Wait until a job has ended, the client has hung up, or ``seconds`` are over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        with self.joined(job_id) as listener:
            while not (listener.over or hang_up.done()) and (left := deadline - loop.time()) > 0:
                await listener.news(left, hang_up)
                if listener.glance is not None and listener.glance.ended:
                    return

    def close(self) -> None:
        """Let everybody go: the service ends."""
        self.closed = True
        for listener in self._listeners:
            listener.end()

    async def _look_on(self) -> None:
        while self._listeners and not self.closed:
            self._wake.clear()
            watch = self._changes.watch()
            watch.add_done_callback(lambda _: self._wake.set())
            try:
                await self._look()
            except Unavailable as error:
                log.warning("those who follow jobs must wait: %s", error)
            except Exception:  # a fault here must not leave all of them without news for good
                log.exception("those who follow jobs must wait")
            await asyncio.sleep(PAUSE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), PATIENCE)
        self._previews.clear()

    async def _look(self) -> None:
        ids = {listener.job_id for listener in self._listeners}
        seen = await run_in_threadpool(self._seen, ids)
        for listener in list(self._listeners):
            if listener.job_id in ids:  # others joined meanwhile
                listener.tell(seen.get(listener.job_id), self._previews.get(listener.job_id, ((), ()))[1])

    def _seen(self, ids: Collection[str]) -> dict[str, Glance]:
        """Look at the jobs, and read the previews of those that have new ones; in a thread."""
        seen = self._glances.look(ids)
        now = {job_id: glance.previews for job_id, glance in seen.items() if glance.previews[1] and not glance.ended}
        known = {job_id: held for job_id, held in self._previews.items() if job_id in now}
        wanted = [job_id for job_id, number in now.items() if job_id not in known or known[job_id][0] != number]
        if wanted:
            known |= {job_id: (now[job_id], shown) for job_id, shown in self._glances.previews(wanted).items()}
        self._previews = known
        return seen
