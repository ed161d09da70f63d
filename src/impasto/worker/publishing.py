"""Puts what jobs came to where others see it: pictures into files, ends into the store.

Knows that either may be away for a while, and how long to keep trying. Knows nothing of how a job is run.

A write whose answer got lost may have been done all the same. It is safe to send it again, because the store knows an
attempt that ended so already; and what nobody knows the outcome of is left to the sweeper, never deleted here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from impasto.errors import Unavailable
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Lease, Output
from impasto.jobs.store import JobStore

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 0.5  # between tries of a write while the store or the files are away
PROBE_SECONDS: Final = 2.0  # between looks whether files can be stored again


class Publisher:
    """Writes for one worker.

    Args:
        store: The job store.
        outputs: Where pictures go.
        patience: Seconds for which a write is tried again: as long as the lease lasts.
        hurry: Set when there is no time left to try again.
    """

    def __init__(self, store: JobStore, outputs: OutputStore, *, patience: float, hurry: threading.Event) -> None:
        self._store = store
        self._outputs = outputs
        self._patience = patience
        self._hurry = hurry
        self._away_since: float | None = None  # time.monotonic(), of the files
        self._probed = 0.0

    def picture(self, lease: Lease, index: int, data: bytes, content_type: str) -> str:
        """Store a picture and return its blob name; while files cannot be stored, try again for as long as is left.

        The patience is for the whole time that they are away, not for each picture.

        Raises:
            Unavailable: Files cannot be stored.
        """
        while True:
            try:
                blob = self._outputs.put(lease.id, lease.attempt, index, data, content_type)
            except Unavailable as error:
                self.files_failed(error)
                if self._given_up() or self._hurry.wait(RETRY_SECONDS):
                    raise
            else:
                self._away_since = None
                return blob

    def files_failed(self, error: Unavailable) -> None:
        """Note that files cannot be stored or read now."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("no files for now: %s (%s)", error, error.__cause__)

    def _given_up(self) -> bool:
        return self._away_since is not None and time.monotonic() > self._away_since + self._patience

    def files_are_there(self) -> bool:
        """Whether a job that is taken now has somewhere to put its pictures; asks, now and then, if there was none."""
        if self._away_since is None:
            return True
        if time.monotonic() > self._probed + PROBE_SECONDS:
            self._probed = time.monotonic()
            try:
                self._outputs.probe()
            except Unavailable:
                return False
            self._away_since = None
            log.info("files can be stored again")
        return self._away_since is None

    def complete(
        self, lease: Lease, outputs: Sequence[Output], timings: Mapping[str, int], loras: Sequence[Mapping[str, Any]]
    ) -> bool | None:
        """Complete a job: as ``JobStore.complete``; ``None`` if it is not known whether that was done."""
        return self._written(lambda: self._store.complete(lease, outputs, timings, loras))

    def fail(self, lease: Lease, error: str, error_class: str) -> bool | None:
        """Give a job up: as ``JobStore.fail``; ``None`` if it is not known whether that was done."""
        return self._written(lambda: self._store.fail(lease, error, error_class))

    def release(self, lease: Lease) -> bool | None:
        """Hand a job back, without trying long; ``None`` if it is not known whether that was done."""
        try:
            return self._store.release(lease)
        except Unavailable as error:
            log.warning("job %s could not be handed back: %s", lease.id, error)
            return None

    def _written(self, write: Callable[[], bool]) -> bool | None:
        """Try to end a job until the store answers; when the lease has run out, the job will be run again."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return write()
            except Unavailable as error:
                log.warning("the job store is away: %s", error)
                if time.monotonic() > deadline or self._hurry.wait(RETRY_SECONDS):
                    return None

    def delete(self, job_id: str, files: list[str]) -> None:
        """Delete files that nobody needs any more: pictures nobody will see, or start pictures of an ended job."""
        try:
            self._outputs.delete(files)
        except Exception:  # files that stay cost space, nothing else
            log.exception("job %s: its files could not be deleted", job_id)
