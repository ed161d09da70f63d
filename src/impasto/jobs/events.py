"""Waits until something may have changed.

Knows how to ask the store for a hint. Knows nothing of what changed: whoever is woken reads the row again.
"""

from __future__ import annotations

import time
from typing import Final

from impasto.jobs.store import JobStore

POLL_SECONDS: Final = 0.03  # one poll costs some ten microseconds on SQLite


class ChangeWatcher:
    """Tells one waiter of commits since it last asked. Make it before reading the row, so that no change slips by."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._seen = store.changes()

    def wait(self, seconds: float) -> bool:
        """Block until something changed or ``seconds`` are over; return whether something changed.

        Raises:
            Unavailable: The database cannot answer.
        """
        deadline = time.monotonic() + seconds
        while (now := self._store.changes()) == self._seen:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(POLL_SECONDS, left))
        self._seen = now
        return True
