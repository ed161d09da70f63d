"""How it is going, all at once: workers, queue, what ended lately.

Knows rows, and the two or three numbers of a worker's report that people want to see. Knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Engine

from impasto.jobs.database import reading
from impasto.jobs.queries import queries
from impasto.jobs.states import TERMINAL, Status
from impasto.jobs.workers import SEEN_SECONDS, Queue, WorkerReport, WorkerReports

WINDOWS: Final = (60, 300, 3600)  # seconds


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """One worker."""

    id: str
    host: str
    device: str
    silent: float  # seconds since it was heard
    running: int  # jobs
    slots: int  # jobs that it can run at once
    completed: int  # jobs, since its start
    images: int  # since its start

    @property
    def there(self) -> bool:
        """Whether it was heard lately."""
        return self.silent <= SEEN_SECONDS


@dataclass(frozen=True, slots=True)
class Ended:
    """What ended in a time."""

    seconds: int  # that time
    completed: int
    failed: int
    cancelled: int
    waited: float  # seconds from submit to start, on average, of completed ones
    ran: float  # seconds from start to end, likewise


@dataclass(frozen=True, slots=True)
class Overview:
    """The state of one installation at one moment."""

    workers: Sequence[WorkerLine]
    queues: Sequence[Queue]
    ended: Sequence[Ended]

    @classmethod
    def of(cls, engine: Engine) -> Overview:
        """Ask a database.

        Raises:
            Unavailable: It cannot answer.
        """
        reports = WorkerReports(engine)
        workers = tuple(_line(report) for report in reports.list())
        return cls(workers, tuple(reports.queues()), tuple(_ended(engine, seconds) for seconds in WINDOWS))


def _line(report: WorkerReport) -> WorkerLine:
    samples = {
        (name, *labels.values()): float(value)
        for family in report.stats
        for name, labels, value in family.get("samples", ())
    }
    return WorkerLine(
        id=report.id,
        host=report.host,
        device=report.device,
        silent=round(report.silent, 1),
        running=int(samples.get(("impasto_worker_jobs", "running"), 0)),
        slots=int(samples.get(("impasto_worker_slots",), 0)),
        completed=int(samples.get(("impasto_jobs_total", "completed"), 0)),
        images=int(samples.get(("impasto_images_total",), 0)),
    )


def _ended(engine: Engine, seconds: int) -> Ended:
    with reading(engine) as db:
        statement = queries(engine.dialect.name)["ended_since"]
        rows: Mapping[str, Any] = {row.status: row for row in db.execute(statement, {"within": seconds * 1000})}
    done = rows.get(Status.COMPLETED)
    count = {status: rows[status].jobs if status in rows else 0 for status in TERMINAL}
    return Ended(
        seconds,
        completed=count[Status.COMPLETED],
        failed=count[Status.FAILED],
        cancelled=count[Status.CANCELLED],
        waited=round(float(done.waited) / 1000, 2) if done else 0.0,
        ran=round(float(done.run) / 1000, 2) if done else 0.0,
    )
