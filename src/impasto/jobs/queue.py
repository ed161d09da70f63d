"""Where a waiting job stands in the queue, and how long that may take: answered from a look of a second ago.

Knows the order of work and how long jobs took lately. Knows nothing of HTTP. However many ask, the database is asked
once a second at most, by a thread of its own; who asks first, or after a pause, gets no answer yet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Engine

from impasto.errors import Unavailable
from impasto.jobs.database import reading
from impasto.jobs.queries import queries

FRESH_SECONDS: Final = 1.0  # after which a look is made again
STALE_SECONDS: Final = 10.0  # after which it tells nothing any more
LONGEST: Final = 5000  # places that are told
WINDOW_SECONDS: Final = 600.0  # what "lately" means

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job stands."""

    position: int  # 1 is next
    seconds: int | None  # until it begins, roughly; None: nothing is known of how long jobs take


@dataclass(frozen=True, slots=True)
class Look:
    """The queue of one pool at one moment."""

    positions: Mapping[str, int] = field(default_factory=dict)
    seconds_per_place: float | None = None
    at: float = -float("inf")  # time.monotonic()


class QueueView:
    """The queue of one database, for many who ask at once.

    Args:
        engine: The database.
        pool: Whose jobs.
    """

    def __init__(self, engine: Engine, pool: str = "default") -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)
        self._pool = pool
        self._last = Look()
        self._lock = threading.Lock()  # guards _looking
        self._looking = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="queue")

    def place(self, job_id: str) -> Place | None:
        """Return where a job stands, or ``None`` where that is not known (yet); never waits."""
        last, now = self._last, time.monotonic()
        if now > last.at + FRESH_SECONDS:
            self._look_soon()
        position = last.positions.get(job_id)
        if position is None or now > last.at + STALE_SECONDS:
            return None
        pace = last.seconds_per_place
        return Place(position, None if pace is None else max(1, round(position * pace)))

    def look(self) -> Look:
        """Ask the database.

        Raises:
            Unavailable: It cannot answer.
        """
        with reading(self._engine) as db:
            ids = db.execute(self._queries["next_in_line"], {"pool": self._pool, "limit": LONGEST}).scalars().all()
            values = {"pool": self._pool, "within": round(WINDOW_SECONDS * 1000)}
            pace = db.execute(self._queries["pace"], values).one()
        # While jobs wait, the workers are full: as many begin as end, and each takes what it took lately.
        known = pace.run is not None and pace.running
        seconds = float(pace.run) / 1000 / pace.running if known else None
        return Look({id: place for place, id in enumerate(ids, 1)}, seconds, time.monotonic())

    def _look_soon(self) -> None:
        with self._lock:
            if self._looking:
                return
            self._looking = True
        try:
            self._thread.submit(self._refresh)
        except RuntimeError:  # the process ends
            return

    def _refresh(self) -> None:
        try:
            self._last = self.look()
        except Unavailable as error:
            log.debug("no look at the queue: %s", error)
        finally:
            with self._lock:
                self._looking = False
