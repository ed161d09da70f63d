"""The queue and the truth about every job; each method is one transaction over statements of ``sql/``.

Knows jobs, leases and the order of work. Knows nothing of HTTP, of what an input means or of how a job is run.

A worker's right to write is its ``Lease``: each claim gives a job a new ``attempt`` number, and a write that
carries an old one changes nothing. So of two workers that believe they hold a job, only the later can finish it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, Engine

from impasto.errors import Conflict, NotFound
from impasto.jobs.database import CommitCounter, reading, writing
from impasto.jobs.limits import NO_LIMITS, Account, Limits
from impasto.jobs.queries import queries
from impasto.jobs.records import Beat, Job, Lease, NewJob, Output, is_job_id
from impasto.jobs.states import TERMINAL, Outcome, Status, check_move
from impasto.jobs.webhooks import record_webhook

REJOIN_SECONDS: Final = 15.0  # how long after its client hung up a job can be come back to
WITHDRAWN: Final = "cancelled: the synchronous request was dropped before it began"
AFFINITY_BUCKET: Final = 4.0  # default pictures' worth of fair share within which loaded LoRAs may go first


class JobStore:
    """All jobs of one database. Safe to share between threads and to open in many processes at once.

    Every method raises ``Unavailable`` when the database cannot answer; nothing was changed then.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)
        self._commits = CommitCounter(engine)

    @property
    def engine(self) -> Engine:
        """The database, for the stores of other subjects beside this one."""
        return self._engine

    def close(self) -> None:
        """Let go of the connection behind ``changes``."""
        self._commits.close()

    def create(self, job: NewJob, max_queued: int, limits: Limits = NO_LIMITS) -> Job:
        """Accept a job; once this returns, it survives a crash of everything but the disk.

        A job with an ``idempotency_key`` that its API key used before is not made again: the first one is returned.
        Nor is one whose client hung up on the same body less than ``REJOIN_SECONDS`` ago, if that has not failed.
        Neither counts against a limit. ``max_queued`` and ``limits`` are for keys without limits of their own.

        Raises:
            Conflict: The idempotency key was used for another body.
            TooManyRequests: The API key is over one of its limits.
            BadRequest: The job is more than the key may have in a whole day.
            Unavailable: As every method, and where ``limits.waiting`` jobs wait already.
            Unauthorized: The API key does not exist, was revoked or has expired.
        """
        with writing(self._engine) as db:
            account = Account.locked(db, self._queries, job.key_id, limits)
            if there := self._repeated(db, job) or self._dropped(db, job):
                return there
            account.check_queues(db, self._queries, job.key_id, max_queued)
            return self._insert(db, job, account.counted().spent(job.cost))

    def _repeated(self, db: Connection, job: NewJob) -> Job | None:
        """Return the job that the same idempotency key made, if there is one; a deleted one is none."""
        values = {"key_id": job.key_id, "idempotency_key": job.idempotency_key}
        row = self._run(db, "find_repeat", **values).mappings().first()
        if row is None or self._run(db, "free_idempotency_key", id=row["id"]).rowcount:
            return None
        if row["body_hash"] != job.body_hash:
            raise Conflict("this Idempotency-Key was used for another request; send a new key, or the same request")
        if row["status"] in TERMINAL:
            return Job.from_row(row)
        return self._rejoined(db, job, row) or Job.from_row(self._run(db, "get_job", id=row["id"]).mappings().one())

    def _dropped(self, db: Connection, job: NewJob) -> Job | None:
        """Return the job that the same request made before its client hung up, if it is not too late."""
        values = {"key_id": job.key_id, "body_hash": job.body_hash, "window": _milliseconds(REJOIN_SECONDS)}
        row = self._run(db, "find_dropped", **values).mappings().first()
        return self._rejoined(db, job, row) if row else None

    def _rejoined(self, db: Connection, job: NewJob, row: Mapping[Any, Any]) -> Job | None:
        """Let a request that came again have the job of ``row``; ``None`` if that ended meanwhile."""
        joined = self._run(db, "rejoin_job", id=row["id"], held=int(job.held)).mappings().first()
        if joined is not None and row["withdrawn"]:
            self._run(db, "record_event", id=row["id"], type="created")
        return Job.from_row(joined) if joined else None

    def _insert(self, db: Connection, job: NewJob, account: Account) -> Job:
        values = {"key_id": job.key_id, "pool": job.pool, "cost": job.cost, **account.to_row()}
        fair = self._run(db, "advance_key", **values).scalar_one()
        row = self._run(
            db,
            "create_job",
            id=secrets.token_hex(16),
            key_id=job.key_id,
            idempotency_key=job.idempotency_key,
            model=job.model,
            pool=job.pool,
            priority=job.priority,
            fair=fair,
            lora_key=_names(job.lora_key),
            input=json.dumps(job.input),
            seed=job.seed,
            webhook_url=job.webhook_url,
            body_hash=job.body_hash,
            holders=int(job.held),
        )
        created = Job.from_row(row.mappings().one())
        self._run(db, "record_event", id=created.id, type="created")
        return created

    def get(self, job_id: str, key_id: str | None = None) -> Job:
        """Return a job as it is now.

        Args:
            job_id: What ``create`` gave.
            key_id: Where given, only a job of this key is found.

        Raises:
            NotFound: There is none, it was deleted, or it belongs to another key; they look the same.
        """
        if is_job_id(job_id):
            with reading(self._engine) as db:
                row = self._run(db, "get_job", id=job_id).mappings().first()
            if row is not None and row["deleted_at"] is None and key_id in (None, row["key_id"]):
                return Job.from_row(row)
        raise NotFound("there is no such prediction; check the id and the API key")

    def claim(
        self, worker: str, n: int, lease_seconds: float, pool: str = "default", loaded: Sequence[str] = ()
    ) -> list[Job]:
        """Give up to ``n`` waiting jobs to ``worker``, those due first in front; empty if none waits.

        No two workers ever get the same job at once: SQLite runs writers one at a time, PostgreSQL skips
        rows that another claim has locked. Keys share the workers evenly, by cost, whatever they queue.

        Args:
            worker: Name of the caller, the same in ``heartbeat``.
            n: Free places.
            lease_seconds: How long the worker may stay silent before the jobs are given to another.
            pool: Which jobs it can run.
            loaded: LoRAs it has ready; jobs that need no others may go a little ahead of their turn.
        """
        with writing(self._engine) as db:
            self._run(db, "take_turn")
            claimed = self._run(
                db,
                "claim_jobs",
                pool=pool,
                limit=max(n, 0),
                worker=worker,
                lease=_milliseconds(lease_seconds),
                loaded=_names(loaded),
                bucket=AFFINITY_BUCKET,
            )
            rows = sorted(claimed.mappings(), key=lambda row: (-row["priority"], row["fair"], row["id"]))
            for row in rows:
                self._run(db, "start_attempt", id=row["id"], attempt=row["attempt"], worker=worker)
                self._run(db, "record_event", id=row["id"], type="started")
            return [Job.from_row({**row, "deaths": self._deaths(db, row)}) for row in rows]

    def _deaths(self, db: Connection, row: Mapping[Any, Any]) -> int:
        """Count the workers that died while they ran a job; at its first attempt none has."""
        return int(self._run(db, "count_deaths", id=row["id"]).scalar_one()) if row["attempt"] > 1 else 0

    def heartbeat(
        self,
        worker: str,
        progress: Mapping[Lease, Mapping[str, Any]],
        lease_seconds: float,
        previews: Mapping[Lease, str] | None = None,
    ) -> Beat:
        """Prolong the leases a worker holds, note how far each job is, and tell it which to drop.

        A job whose owner cancelled it ends here, so the worker has only to forget it. ``previews`` are shown in place
        of what those jobs showed before, and go when their jobs end; see ``events.encode_previews``.
        """
        lost: set[Lease] = set()
        cancelled: set[Lease] = set()
        if not progress:
            return Beat()
        lease_time = _milliseconds(lease_seconds)
        with writing(self._engine) as db:
            for lease, done in sorted(progress.items(), key=lambda item: item[0]):
                values = {**asdict(lease), "worker": worker, "lease": lease_time, "progress": json.dumps(done)}
                row = self._run(db, "beat", **values).first()
                if row is None:
                    lost.add(lease)
                elif row.cancel_requested:
                    self._end_cancelled(db, lease)
                    cancelled.add(lease)
                elif previews and lease in previews:
                    self._run(db, "show_preview", **asdict(lease), preview=previews[lease])
        return Beat(frozenset(lost), frozenset(cancelled))

    def complete(
        self,
        lease: Lease,
        outputs: Sequence[Output],
        timings: Mapping[str, int],
        loras: Sequence[Mapping[str, Any]] = (),
    ) -> bool:
        """Make a job's outputs visible.

        Args:
            lease: From ``Job.lease`` of the claimed job.
            outputs: Pictures already in the ``OutputStore``.
            timings: Name to milliseconds.
            loras: What became of each LoRA, as JSON values; the store never looks inside.

        Returns:
            False if the lease is lost or the job was cancelled: nobody will see the outputs, so delete them.
            Said again after an answer that got lost, it changes nothing and is what it was the first time.
        """
        with writing(self._engine) as db:
            return self._end(db, lease, Status.COMPLETED, Outcome.OK, outputs=outputs, timings=timings, loras=loras)

    def fail(self, lease: Lease, error: str, error_class: str) -> bool:
        """Give a job up for good, with a message that its owner will read.

        Returns:
            False if the lease is lost or the job was cancelled.
        """
        with writing(self._engine) as db:
            return self._end(db, lease, Status.FAILED, Outcome.ERROR, error=error, error_class=error_class)

    def release(self, lease: Lease) -> bool:
        """Hand a job back unharmed: it keeps its place, and this attempt does not count against it.

        Returns:
            False if the lease is lost or the job was cancelled.
        """
        with writing(self._engine) as db:
            return self._requeue(db, lease, Outcome.RELEASED)

    def cancel(self, job_id: str, key_id: str) -> Job:
        """Stop a job for its owner: a waiting one ends now, a running one at its worker's next word.

        A job that has ended stays as it is.

        Raises:
            NotFound: As ``get``.
        """
        if is_job_id(job_id):
            with writing(self._engine) as db:
                row = self._run(db, "cancel_job", id=job_id, key_id=key_id).first()
                if row is not None and row.status == Status.CANCELLED:
                    self._run(db, "record_event", id=job_id, type=Status.CANCELLED)
                    record_webhook(db, job_id)
        return self.get(job_id, key_id)

    def held_for(self, key_id: str, body_hash: str) -> float | None:
        """Return the age in seconds of a job with this body, not ended, that a synchronous request still holds."""
        with reading(self._engine) as db:
            age = self._run(db, "find_held", key_id=key_id, body_hash=body_hash).scalar()
        return None if age is None else float(age) / 1000

    def drop(self, job_id: str, *, withdraw: bool = True) -> bool:
        """Note that a client hung up on its job; the same request finds it again for ``REJOIN_SECONDS``.

        Args:
            job_id: Its job. One that is ended, other than completed, stays as it is.
            withdraw: Whether no worker is to begin it now, unless another client holds it too.

        Returns:
            Whether it is withdrawn.
        """
        with writing(self._engine) as db:
            row = self._run(db, "drop_job", id=job_id, withdraw=withdraw).first()
            withdrawn = row is not None and bool(row.withdrawn)
            if withdrawn:
                self._run(db, "record_event", id=job_id, type="withdrawn")
        return withdrawn

    def abandon(self, worker: str) -> None:
        """End the leases of a worker that is known to be dead, so that ``reap`` need not wait for them."""
        with writing(self._engine) as db:
            self._run(db, "abandon", worker=worker)

    def reap(self, max_attempts: int) -> list[str]:
        """Take jobs away from workers that fell silent; anybody may call this, as often as they like.

        A job goes back to its place in the queue, or fails if ``max_attempts`` workers died while running it:
        such a job is likely to be what kills them. A withdrawn job that nobody came back to ends as cancelled.

        Returns:
            Ids of the jobs that were taken away.
        """
        with writing(self._engine) as db:
            gone = self._run(db, "end_withdrawn", error=WITHDRAWN, window=_milliseconds(REJOIN_SECONDS)).all()
            for row in gone:
                self._run(db, "record_event", id=row.id, type=Status.CANCELLED)
                record_webhook(db, row.id)
            rows = self._run(db, "expired").all()
            for row in rows:
                lease = Lease(row.id, row.attempt)
                if row.lost + 1 < max_attempts:
                    self._requeue(db, lease, Outcome.LEASE_LOST)
                else:
                    self._end(db, lease, Status.FAILED, Outcome.LEASE_LOST, _died(row.lost + 1), "worker_lost")
        return [row.id for row in rows]

    def queue_depth(self, pool: str = "default") -> int:
        """Count the jobs that wait in ``pool``."""
        with reading(self._engine) as db:
            return int(self._run(db, "queue_depth", pool=pool).scalar_one())

    def changes(self) -> int:
        """Return a number that differs from the last one if another connection has committed since.

        A hint only, made to be asked often; ``events.ChangeWatcher`` waits for it.
        """
        return self._commits.read()

    def _run(self, db: Connection, statement: str, **values: Any) -> CursorResult[Any]:
        return db.execute(self._queries[statement], values)

    def _end(
        self,
        db: Connection,
        lease: Lease,
        status: Status,
        outcome: Outcome,
        error: str = "",
        error_class: str = "",
        outputs: Iterable[Output] = (),
        timings: Mapping[str, int] | None = None,
        loras: Sequence[Mapping[str, Any]] = (),
    ) -> bool:
        """End a held job; a cancel that came first wins. Returns whether ``status`` was reached."""
        check_move(Status.PROCESSING, status)
        ended = self._run(
            db,
            "end_job",
            **asdict(lease),
            status=status,
            error=_plain(error),
            error_class=error_class,
            outputs=json.dumps([asdict(output) for output in outputs]),
            timings=json.dumps(dict(timings or {})),
            loras=json.dumps([dict(report) for report in loras]),
        )
        if not ended.rowcount:
            self._end_cancelled(db, lease)
            return self._done_before(db, lease, outcome)
        self._note(db, lease, outcome, status)
        return True

    def _requeue(self, db: Connection, lease: Lease, outcome: Outcome) -> bool:
        check_move(Status.PROCESSING, Status.CREATED)
        if not self._run(db, "requeue_job", **asdict(lease)).rowcount:
            self._end_cancelled(db, lease)
            return self._done_before(db, lease, outcome)
        self._note(db, lease, outcome, "requeued")
        return True

    def _done_before(self, db: Connection, lease: Lease, outcome: Outcome) -> bool:
        """Whether this attempt has ended so already: its worker says it again, because no answer reached it."""
        return bool(self._run(db, "outcome_of_attempt", **asdict(lease)).scalar() == outcome)

    def _end_cancelled(self, db: Connection, lease: Lease) -> None:
        """End a held job that its owner cancelled; any other is left alone."""
        check_move(Status.PROCESSING, Status.CANCELLED)
        if self._run(db, "end_cancelled", **asdict(lease)).rowcount:
            self._note(db, lease, Outcome.CANCELLED, Status.CANCELLED)

    def _note(self, db: Connection, lease: Lease, outcome: Outcome, event: str) -> None:
        self._run(db, "end_attempt", **asdict(lease), outcome=outcome)
        self._run(db, "record_event", id=lease.id, type=event)
        if event in TERMINAL:
            record_webhook(db, lease.id)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _names(loras: Iterable[str]) -> str:
    """Write LoRA names as a JSON list of plain ASCII, which both databases can read whatever a name contains."""
    return json.dumps([name.encode("unicode_escape").decode("ascii") for name in loras])


def _plain(message: str) -> str:
    """Drop what a database's text cannot hold: NUL, and halves of surrogate pairs."""
    return message.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _died(times: int) -> str:
    often = "once" if times == 1 else f"{times} times"
    return f"the worker died {often} while running this job; try a smaller size or fewer images"
