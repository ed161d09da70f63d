"""Reading jobs for many requests at once: those that ask while one read is under way share the next.

Knows who waits for which job. Knows nothing of HTTP. A poll of its own costs a thread's wake-up, a connection and a
statement; two hundred clients that poll need one of each for as many polls as came meanwhile. Alone, a poll waits for
nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from fastapi.concurrency import run_in_threadpool

from impasto.errors import NotFound
from impasto.jobs.records import Job, is_job_id


class SharedReads:
    """Reads jobs, one statement at a time, from one event loop.

    Args:
        read: Returns those of some jobs that are there, by id; called in a thread.
    """

    def __init__(self, read: Callable[[Collection[str]], Mapping[str, Job]]) -> None:
        self._read = read
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[Mapping[str, Job]] | None = None  # the read that has not begun
        self._wanted: set[str] = set()  # by those who wait for it

    async def get(self, job_id: str, key_id: str) -> Job:
        """Return a job of this key as it is now, or later.

        Raises:
            NotFound: There is none, it was deleted, or it belongs to another key; they look the same.
            Unavailable: The database cannot answer.
        """
        if not is_job_id(job_id):
            raise NotFound("no such prediction")
        if self._next is None:
            self._wanted = set()
            self._next = asyncio.create_task(self._read_all(self._wanted))
            self._next.add_done_callback(_noted)
        self._wanted.add(job_id)
        job = (await asyncio.shield(self._next)).get(job_id)  # one who goes away leaves the others their read
        if job is None or job.key_id != key_id:
            raise NotFound("no such prediction")
        return job

    async def _read_all(self, wanted: Collection[str]) -> Mapping[str, Job]:
        async with self._turn:
            self._next = None  # a read that has begun may be too old for those who ask from now on
            return await run_in_threadpool(self._read, wanted)


def _noted(task: asyncio.Task[Mapping[str, Job]]) -> None:
    """Look at how a read ended, for the case that all who wanted it have gone."""
    if not task.cancelled():
        task.exception()
