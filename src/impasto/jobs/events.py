"""Waits until something may have changed, and tells how many jobs stand at one look.

Knows how to ask the store for a hint, and what those who follow a job want to see often: state, steps, previews. Knows
nothing of who follows, or of the rest of a job.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Engine

from impasto.jobs.database import reading
from impasto.jobs.queries import queries
from impasto.jobs.states import TERMINAL, Status
from impasto.jobs.store import JobStore

POLL_SECONDS: Final = 0.03  # one poll costs some ten microseconds on SQLite
PREVIEW_COUNT: Final = "previews"  # in a job's progress: how many looks at its pictures there were


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


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """What one picture of a running job is becoming."""

    index: int  # position among the job's pictures, 0-based
    step: int  # steps that were done
    image: str = field(repr=False)  # a small JPEG, base64


@dataclass(frozen=True, slots=True)
class Glance:
    """A job as those who follow it see it."""

    status: Status
    seq: int  # number of its last change of state; grows
    attempt: int
    progress: Mapping[str, Any]

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in TERMINAL

    @property
    def previews(self) -> tuple[int, int]:
        """A value that differs from the last one if there are new previews; its second part is 0 if there are none."""
        return self.attempt, int(self.progress.get(PREVIEW_COUNT, 0))


class JobGlances:
    """Looks at many jobs in one statement; every method raises ``Unavailable`` when the database cannot answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)

    def look(self, ids: Collection[str]) -> dict[str, Glance]:
        """Return those of the jobs that are there, by id; a deleted one is not."""
        with reading(self._engine) as db:
            rows = db.execute(self._queries["glances"], {"ids": json.dumps(list(ids))}).all()
        return {row.id: Glance(Status(row.status), row.seq or 0, row.attempt, json.loads(row.progress)) for row in rows}

    def previews(self, ids: Collection[str]) -> dict[str, tuple[Thumbnail, ...]]:
        """Return what the jobs show now, by id."""
        with reading(self._engine) as db:
            rows = db.execute(self._queries["previews"], {"ids": json.dumps(list(ids))}).all()
        return {row.id: decode_previews(row.preview) for row in rows}


def encode_previews(thumbnails: Collection[Thumbnail]) -> str:
    """Write thumbnails as the store keeps them."""
    return json.dumps([[shown.index, shown.step, shown.image] for shown in thumbnails])


def decode_previews(text: str) -> tuple[Thumbnail, ...]:
    """Read what ``encode_previews`` wrote."""
    return tuple(Thumbnail(*values) for values in json.loads(text))
