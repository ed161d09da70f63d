"""Jobs of the past: listed page by page, deleted by their owner, expired, and cleaned up after.

Knows rows and the files that belong to them. Knows nothing of HTTP, and of a job's input only that its files stand
under ``pictures``. Deleting is in two steps: the owner sees nothing more at once, and the rows go an hour later, when
no worker can still be writing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, Engine, Row

from impasto.jobs.database import reading, writing
from impasto.jobs.outputs import OutputStore
from impasto.jobs.queries import queries
from impasto.jobs.records import Job, is_job_id
from impasto.jobs.states import TERMINAL, Status

GRACE_SECONDS: Final = 3600.0  # after which a worker that lost a job has surely stopped writing for it
_BATCH: Final = 200  # rows looked at in one go
_FOREVER: Final = 2**62  # milliseconds
# Clients are shown cancelled jobs as failed ones, so who asks for failed ones gets both.
_SHOWN_AS: Final = {Status.FAILED: (Status.FAILED, Status.CANCELLED)}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which of a key's jobs to list; what is ``None`` does not matter.

    Attributes:
        page: 1 is the newest.
        page_size: Jobs on a page.
        after: Made then or later.
        before: Made earlier than then.
        model: The id posted to.
        status: Where the job stands; ``FAILED`` stands for cancelled ones, too.
    """

    page: int = 1
    page_size: int = 20
    after: datetime | None = None
    before: datetime | None = None
    model: str | None = None
    status: Status | None = None


class History:
    """The past of one database. Every method raises ``Unavailable`` when the database cannot answer.

    Args:
        engine: The database.
        outputs: Where the files are.
    """

    def __init__(self, engine: Engine, outputs: OutputStore) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)
        self._outputs = outputs

    def page(self, key_id: str, wanted: Wanted) -> tuple[list[Job], int]:
        """Return one page of a key's jobs, the newest first, and how many jobs all pages have."""
        statuses = () if wanted.status is None else _SHOWN_AS.get(wanted.status, (wanted.status,))
        which = {
            "key_id": key_id,
            "after": _milliseconds(wanted.after, 0),
            "before": _milliseconds(wanted.before, _FOREVER),
            "model": wanted.model or "",
            "status": statuses[0] if statuses else "",
            "or_status": statuses[-1] if statuses else "",
        }
        offset = (wanted.page - 1) * wanted.page_size
        with reading(self._engine) as db:
            total = int(self._run(db, "count_predictions", **which).scalar_one())
            rows = self._run(db, "list_predictions", **which, limit=wanted.page_size, offset=offset).mappings()
            return [Job.from_row(row) for row in rows], total

    def delete(self, key_id: str, job_ids: Iterable[str]) -> int:
        """Delete a key's jobs with their files, and stop those that run; return how many there were.

        Unknown ids and those of another key's jobs count nothing.
        """
        return sum(self._delete(key_id, job_id) for job_id in dict.fromkeys(job_ids) if is_job_id(job_id))

    def _delete(self, key_id: str, job_id: str) -> bool:
        with writing(self._engine) as db:
            stopped = self._run(db, "cancel_job", id=job_id, key_id=key_id).first()
            if stopped is not None and stopped.status == Status.CANCELLED:
                self._run(db, "record_event", id=job_id, type=Status.CANCELLED)
            row = self._run(db, "hide_prediction", id=job_id, key_id=key_id).first()
        if row is None:
            return False
        if row.status in TERMINAL:  # a running job's worker deletes what it made
            self._outputs.delete([*_blobs(row.outputs), *_inputs(row.input)])
        return True

    def expire(self, seconds: float) -> int:
        """Delete the pictures of jobs that ended so long ago; return how many jobs. The jobs themselves stay."""

        def expire(row: Row[Any]) -> None:
            # The files first: a crash in between leaves a job whose files are gone, and the next sweep ends it.
            self._outputs.delete(_blobs(row.outputs))
            self._write("expire_prediction", id=row.id)

        return self._each("predictions_to_expire", expire, kept=round(seconds * 1000))

    def forget(self, seconds: float) -> int:
        """Delete whole jobs that ended so long ago, with their files; return how many.

        One whose webhook is still on its way stays until that has arrived, or is given up.
        """

        def forget(row: Row[Any]) -> None:
            self._outputs.delete([*_blobs(row.outputs), *_inputs(row.input)])
            self._write("forget_prediction", id=row.id)

        return self._each("predictions_to_forget", forget, kept=round(seconds * 1000))

    def purge(self, grace: float = GRACE_SECONDS) -> int:
        """Delete the rows of jobs that were deleted ``grace`` seconds ago, with whatever files are left."""

        def purge(row: Row[Any]) -> None:
            self._outputs.delete([*self._outputs.older(f"{row.id}/", 0), *_inputs(row.input)])
            with writing(self._engine) as db:
                for statement in ("purge_webhooks", "purge_events", "purge_attempts", "purge_prediction"):
                    self._run(db, statement, id=row.id)

        return self._each("predictions_to_purge", purge, grace=round(grace * 1000))

    def sweep_attempts(self, grace: float = GRACE_SECONDS) -> int:
        """Delete the pictures of attempts that ended without a result ``grace`` seconds ago; return how many.

        An attempt's number is in its files' names and is never given again, so neither the pictures of the attempt
        that delivered nor those of one that runs now can be among them.
        """

        def sweep(row: Row[Any]) -> None:
            its = f"{row.prediction_id}/{row.attempt}-"
            files = self._outputs.older(f"{row.prediction_id}/", 0)
            self._outputs.delete([name for name in files if name.startswith(its)])
            self._write("attempt_swept", id=row.prediction_id, attempt=row.attempt)

        return self._each("attempts_to_sweep", sweep, grace=round(grace * 1000))

    def sweep_inputs(self, grace: float = GRACE_SECONDS) -> int:
        """Delete start pictures of that age which no waiting or running job needs; return how many."""
        if not (found := list(self._outputs.older("inputs/", grace))):
            return 0
        with reading(self._engine) as db:
            needed = {name for text in self._run(db, "live_inputs").scalars() for name in _inputs(text)}
        left = [name for name in found if name not in needed]
        self._outputs.delete(left)
        return len(left)

    def _each(self, statement: str, act: Callable[[Row[Any]], None], **values: Any) -> int:
        """Do something about every row that a statement finds, some at a time; afterwards it finds them no more."""
        done = 0
        while True:
            with reading(self._engine) as db:
                rows: Sequence[Row[Any]] = self._run(db, statement, **values, limit=_BATCH).all()
            for row in rows:
                act(row)
            done += len(rows)
            if len(rows) < _BATCH:
                return done

    def _write(self, statement: str, **values: Any) -> None:
        with writing(self._engine) as db:
            self._run(db, statement, **values)

    def _run(self, db: Connection, statement: str, **values: Any) -> CursorResult[Any]:
        return db.execute(self._queries[statement], values)


def _blobs(outputs: str) -> list[str]:
    """Return the files of a job's outputs, from its row."""
    return [output["blob"] for output in json.loads(outputs)]


def _inputs(text: str) -> list[str]:
    """Return the files that a job starts from, from its row."""
    return list(json.loads(text).get("pictures", {}).values())


def _milliseconds(moment: datetime | None, default: int) -> int:
    """Return milliseconds since 1970; a time between two is rounded up, as rows have whole ones."""
    return default if moment is None else -int(-moment.timestamp() * 1000 // 1)
