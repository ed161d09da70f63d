"""Waiting for a job without holding a thread or the event loop.

Knows when "something in the store changed". Knows nothing of which job: a waiter reads its own row again. One
thread watches the store for all waiting requests; with nobody waiting there is none.
"""

from __future__ import annotations

import asyncio

from fastapi.concurrency import run_in_threadpool

from impasto.errors import Unavailable
from impasto.jobs.events import ChangeWatcher

PATIENCE = 0.5  # seconds after which waiters look again even if no change was seen: changes are hints


class Changes:
    """Wakes every waiting request at the store's next change."""

    def __init__(self, watcher: ChangeWatcher) -> None:
        self._watcher = watcher
        self._watch: asyncio.Task[None] | None = None

    def watch(self) -> asyncio.Task[None]:
        """Return the watch under way, or begin one; take it before reading the row, so no change falls between."""
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())
        return self._watch

    async def _look(self) -> None:
        try:
            await run_in_threadpool(self._watcher.wait, PATIENCE)
        except Unavailable:  # a waiter reads its row next, and meets the same error with somebody to tell
            await asyncio.sleep(PATIENCE)

    async def next(self, watch: asyncio.Task[None], seconds: float, *others: asyncio.Task[None]) -> None:
        """Wait until ``watch`` or one of the ``others`` ended or ``seconds`` are over; none of them is disturbed."""
        await asyncio.wait({watch, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Let the watch under way end."""
        if self._watch is not None:
            await asyncio.wait({self._watch})
