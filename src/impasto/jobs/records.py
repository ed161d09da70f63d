"""What the store takes and gives: frozen values that cross the border between rooms.

Knows the shape of a job and how a row becomes one. Knows nothing of connections or of what an input means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from impasto.jobs.states import Status

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_JOB_ID: Final = re.compile(r"[0-9a-f]{32}")


def is_job_id(text: str) -> bool:
    """Tell whether ``text`` has the form of a job's id: 32 lowercase hexadecimal digits."""
    return _JOB_ID.fullmatch(text) is not None


def moment(milliseconds: int) -> datetime:
    """Turn the database's integer (milliseconds since 1970, UTC) into an aware datetime, exactly."""
    return _EPOCH + timedelta(milliseconds=milliseconds)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as it is handed in.

    Raises:
        ValueError: ``cost`` is not a positive finite number; one such job would upset everybody's turn.
    """

    model: str
    input: Mapping[str, Any]  # JSON values; the store never looks inside
    key_id: str
    seed: int
    cost: float = 1.0  # work in units of one default picture; a key's share is counted in it
    pool: str = "default"  # which workers may take it
    lora_key: tuple[str, ...] = ()  # LoRAs it needs; a worker that has them loaded is preferred
    priority: int = 0  # higher goes first, whatever the fair share says
    idempotency_key: str | None = None  # the same text from the same key is the same job
    webhook_url: str | None = None  # told of the job's end
    body_hash: str | None = None  # of the request; one that is sent again has the same
    held: bool = False  # whether a synchronous request waits for it

    def __post_init__(self) -> None:
        if not 0 < self.cost < math.inf:
            raise ValueError(f"cost must be a positive number, got {self.cost}")


@dataclass(frozen=True, slots=True)
class Output:
    """One finished picture: where its bytes are and what they are."""

    blob: str  # name in the ``OutputStore``
    content_type: str
    width: int  # pixels
    height: int  # pixels
    nsfw: bool
    seed: int
    made: Mapping[str, Any] | None = field(default=None, hash=False)  # what it takes to make it again, as JSON values


@dataclass(frozen=True, slots=True, order=True)
class Lease:
    """A worker's right to write to a job. ``attempt`` only grows, so an old lease never works again."""

    id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker learns from a heartbeat: leases it must drop, and why."""

    lost: frozenset[Lease] = frozenset()  # another worker has the job, or nobody: write nothing more
    cancelled: frozenset[Lease] = frozenset()  # the owner stopped it; the job is already ended


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the database has it at one moment."""

    id: str
    key_id: str
    model: str
    input: dict[str, Any]
    status: Status
    attempt: int  # times it was given to a worker
    seed: int
    outputs: tuple[Output, ...]
    error: str  # safe to show; empty unless failed or cancelled
    error_class: str  # one word for programs, such as ``worker_lost``
    timings: dict[str, int]  # milliseconds
    loras: tuple[dict[str, Any], ...]  # what became of each LoRA, as JSON values; empty unless completed
    progress: dict[str, Any]
    cancel_requested: bool
    withdrawn: bool  # its client hung up before it began: no worker takes it unless the same request comes again
    created_at: datetime  # UTC, whole milliseconds, by the database's clock; so are the next two
    started_at: datetime | None
    finished_at: datetime | None
    expired_at: datetime | None  # its pictures were deleted then
    pool: str = field(repr=False)
    lora_key: tuple[str, ...] = field(repr=False)
    deaths: int = field(default=0, repr=False, compare=False)  # of its workers so far; told by a claim alone

    @property
    def lease(self) -> Lease:
        """The lease of the attempt this job is at; of use only to the worker that claimed it."""
        return Lease(self.id, self.attempt)

    @classmethod
    def from_row(cls, row: Mapping[Any, Any]) -> Job:
        """Build a job from a row of ``predictions``."""
        return cls(
            id=row["id"],
            key_id=row["key_id"],
            model=row["model"],
            input=json.loads(row["input"]),
            status=Status(row["status"]),
            attempt=row["attempt"],
            seed=row["seed"],
            outputs=tuple(Output(**output) for output in json.loads(row["outputs"])),
            error=row["error"],
            error_class=row["error_class"],
            timings=json.loads(row["timings"]),
            loras=tuple(json.loads(row["loras"])),
            progress=json.loads(row["progress"]),
            cancel_requested=bool(row["cancel_requested"]),
            withdrawn=bool(row["withdrawn"]),
            created_at=moment(row["created_at"]),
            started_at=_optional_moment(row["started_at"]),
            finished_at=_optional_moment(row["finished_at"]),
            expired_at=_optional_moment(row["expired_at"]),
            pool=row["pool"],
            lora_key=tuple(json.loads(row["lora_key"])),
            deaths=row.get("deaths", 0),
        )


def _optional_moment(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else moment(milliseconds)
