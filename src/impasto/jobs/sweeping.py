"""Deletes what nobody needs any more: expired pictures, old uploads, and what crashes and cancels left behind.

Knows the order and how often. Knows nothing of how one kind is found (``history.py``, ``uploads.py``). Every sweep can
be run again and beside others, in any process: each looks at what is there, and deletes only what no row needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from impasto.jobs.history import GRACE_SECONDS, History
from impasto.jobs.uploads import UploadStore

LONGEST_PAUSE: Final = 60.0  # seconds between sweeps
SHORTEST_PAUSE: Final = 0.5
LISTING_SECONDS: Final = 900.0  # between looks through whole folders, which cost more than a query

log = logging.getLogger(__name__)


class Sweeper:
    """Sweeps one database and its files.

    Args:
        history: Jobs of the past.
        uploads: Files that clients sent.
        output_seconds: How long pictures are kept after their job ended; 0: for ever.
        keep_seconds: How long the jobs themselves are; 0: for ever.
        grace: Age of what is looked at by its files alone: younger ones may be about to get a row.
    """

    def __init__(
        self,
        history: History,
        uploads: UploadStore,
        *,
        output_seconds: float = 0,
        keep_seconds: float = 0,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._history = history
        self._uploads = uploads
        self._output_seconds = output_seconds
        self._keep_seconds = keep_seconds
        self._grace = grace
        self._listed = -LISTING_SECONDS  # when folders were looked through, by the monotonic clock

    @property
    def pause(self) -> float:
        """Seconds from one sweep to the next: nothing outlives its time by more than a tenth of it, or a minute."""
        wanted = [seconds / 10 for seconds in (self._output_seconds, self._keep_seconds) if seconds]
        return max(min([*wanted, LONGEST_PAUSE]), SHORTEST_PAUSE)

    def sweep(self) -> dict[str, int]:
        """Sweep once; return how many of each kind were deleted. One kind that fails does not keep the others."""
        kinds: dict[str, Callable[[], int]] = {
            "uploads": self._uploads.sweep,
            "deleted jobs": lambda: self._history.purge(self._grace),
            "failed attempts": lambda: self._history.sweep_attempts(self._grace),
        }
        if self._output_seconds:
            kinds["expired jobs"] = lambda: self._history.expire(self._output_seconds)
        if self._keep_seconds:
            kinds["old jobs"] = lambda: self._history.forget(self._keep_seconds)
        if time.monotonic() - self._listed >= LISTING_SECONDS:
            self._listed = time.monotonic()
            kinds["start pictures"] = lambda: self._history.sweep_inputs(self._grace)
            kinds["uploads without a row"] = lambda: self._uploads.sweep_orphans(self._grace)
        return {kind: swept for kind, sweep in kinds.items() if (swept := _tried(kind, sweep))}


def _tried(kind: str, sweep: Callable[[], int]) -> int:
    try:
        swept = sweep()
    except Exception:  # the next sweep may do better; nothing but space depends on it
        log.exception("%s could not be swept", kind)
        return 0
    if swept:
        log.info("swept %d %s", swept, kind)
    return swept
