"""Sweeping while the service runs: now and then, in a thread, in every process that serves.

Knows when. Knows nothing of what is swept (``jobs/sweeping.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi.concurrency import run_in_threadpool

from impasto.api.incoming import sweep as sweep_incoming
from impasto.api.service import Service
from impasto.jobs.sweeping import Sweeper


@contextlib.asynccontextmanager
async def cleaning(service: Service) -> AsyncIterator[None]:
    """Sweep for as long as the block runs; a sweep under way at its end is finished in its thread."""
    kept = service.settings
    sweeper = Sweeper(
        service.history, service.uploads, output_seconds=kept.output_seconds, keep_seconds=kept.keep_seconds
    )
    task = asyncio.create_task(_sweeping(sweeper, service))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _sweeping(sweeper: Sweeper, service: Service) -> None:
    while True:
        await asyncio.sleep(sweeper.pause)
        await run_in_threadpool(sweeper.sweep)
        with contextlib.suppress(OSError):  # another process deleted it first
            await run_in_threadpool(sweep_incoming, service.settings.incoming_dir)
