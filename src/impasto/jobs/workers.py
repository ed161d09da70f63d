"""What workers say of themselves, and how long the queue is: for metrics and for "is anybody there".

Knows rows of ``workers``. Knows nothing of what the numbers in a report mean, and gives nobody work: a worker that is
missing here still runs jobs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Engine

from impasto.jobs.database import reading, writing
from impasto.jobs.queries import queries
from impasto.jobs.queue import QueueView

REPORT_SECONDS: Final = 5.0  # between reports of a worker
SEEN_SECONDS: Final = 20.0  # silence after which a worker does not count as there
FORGET_SECONDS: Final = 300.0  # silence after which its numbers go, too


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker as it last spoke."""

    id: str
    host: str
    device: str  # such as ``cuda:0``
    pool: str  # whose jobs it takes
    stats: list[dict[str, Any]]  # metric families since its start, as JSON values
    silent: float = 0.0  # seconds since then


@dataclass(frozen=True, slots=True)
class Queue:
    """The jobs of one pool."""

    pool: str
    waiting: int = 0
    oldest: float = 0.0  # seconds that the oldest of those has waited
    running: int = 0


class WorkerReports:
    """The workers of one database, and what they work off. Methods raise ``Unavailable`` when it cannot answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)
        self.line = QueueView(engine)

    def report(self, worker: WorkerReport) -> None:
        """Say that a worker is alive, and forget those that have not been heard for long."""
        values = {"id": worker.id, "host": worker.host, "device": worker.device, "pool": worker.pool}
        with writing(self._engine) as db:
            db.execute(self._queries["report_worker"], {**values, "stats": json.dumps(worker.stats)})
            db.execute(self._queries["forget_workers"], {"silent": _milliseconds(FORGET_SECONDS)})

    def remove(self, worker: str) -> None:
        """Forget a worker that has ended, or was found dead."""
        with writing(self._engine) as db:
            db.execute(self._queries["remove_worker"], {"id": worker})

    def list(self) -> tuple[WorkerReport, ...]:
        """Return all that are remembered, the oldest first, silent ones too."""
        with reading(self._engine) as db:
            return tuple(_report(row) for row in db.execute(self._queries["list_workers"]).mappings())

    def seen(self, within: float = SEEN_SECONDS) -> int:
        """Count the workers that were heard in the last ``within`` seconds."""
        with reading(self._engine) as db:
            return int(db.execute(self._queries["seen_workers"], {"within": _milliseconds(within)}).scalar_one())

    def queues(self) -> Sequence[Queue]:
        """Return the queue of each pool that has jobs, and that of the default pool always."""
        with reading(self._engine) as db:
            waiting = {row.pool: row for row in db.execute(self._queries["waiting_by_pool"])}
            running = {row.pool: row.jobs for row in db.execute(self._queries["running_by_pool"])}
        return [
            Queue(
                pool,
                waiting[pool].jobs if pool in waiting else 0,
                max(0, waiting[pool].oldest) / 1000 if pool in waiting else 0.0,
                running.get(pool, 0),
            )
            for pool in sorted({"default", *waiting, *running})
        ]


def _report(row: Mapping[Any, Any]) -> WorkerReport:
    return WorkerReport(
        id=row["id"],
        host=row["host"],
        device=row["device"],
        pool=row["pool"],
        stats=json.loads(row["stats"]),
        silent=max(0, row["silent"]) / 1000,
    )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
