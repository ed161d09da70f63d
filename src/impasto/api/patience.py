"""Waiting out a database that is away for a moment: a restart, a failover.

Knows time. Only for requests that ask: several clients give a running job up at the first 5xx of a poll, and a poll
loses nothing by waiting. What a request would have added is refused at once, and nothing is kept for later in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from impasto.errors import Unavailable

PAUSE: Final = 0.3  # seconds between tries
Result = TypeVar("Result")


async def patiently(seconds: float, attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Return what ``attempt`` gives, trying again for ``seconds`` while the database cannot answer.

    Raises:
        Unavailable: It could not in all that time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await attempt()
        except Unavailable:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            await asyncio.sleep(min(PAUSE, left))
