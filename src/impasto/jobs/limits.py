"""How much a key may do: requests a minute, jobs that wait, jobs that run, work in a day.

Knows the arithmetic and the row it works on. Knows nothing of HTTP. All of it happens in the transaction that takes the
job, on the key's row, which that transaction has locked: so limits hold exactly over any number of processes, and one
key waits for nobody but itself. Jobs that run are counted where they are claimed, in ``sql/predictions.sql``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, TextClause

from impasto.errors import BadRequest, InvalidInput, TooManyRequests, Unauthorized, Unavailable

MINUTE: Final = 60_000.0  # milliseconds
DAY: Final = 86_400_000  # milliseconds
CROWDED_SECONDS: Final = 15  # a guess: after which a queue that is full for everybody may have room
MOST: Final = 1_000_000_000  # no limit is higher: the database has whole numbers of 32 bits


@dataclass(frozen=True, slots=True)
class Limits:
    """What every key may do that has no limits of its own; 0 is no limit."""

    rate: int = 0  # submits and uploads a minute
    running: int = 0  # jobs that workers hold at once
    daily: float = 0.0  # default pictures' worth of work in a day (UTC)
    waiting: int = 0  # jobs that wait, of all keys together


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may do; ``None`` is what the settings say, 0 is no limit.

    Raises:
        InvalidInput: A limit is negative, too high or no number, or the weight is not above 0.
    """

    rate: int | None = None  # submits and uploads a minute
    running: int | None = None  # jobs that workers hold at once
    queued: int | None = None  # jobs that wait
    daily: float | None = None  # default pictures' worth of work in a day (UTC)
    weight: float = 1.0  # its share of the workers: twice the weight, twice the share

    def __post_init__(self) -> None:
        for name in ("rate", "running", "queued", "daily"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST:
                raise InvalidInput(name, f"must be from 0, which is no limit, to {MOST}, got {value}")
        if not 0.001 <= self.weight <= 1000:
            raise InvalidInput("weight", f"must be from 0.001 to 1000, got {self.weight}")

    @classmethod
    def from_row(cls, row: Mapping[Any, Any]) -> KeyLimits:
        """Read them from a row of ``keys``."""
        return cls(
            row["rate_per_minute"], row["max_running"], row["max_queued"], row["daily_pictures"], float(row["weight"])
        )

    def to_row(self) -> dict[str, Any]:
        """Return the columns of ``keys``."""
        return {
            "rate_per_minute": self.rate,
            "max_running": self.running,
            "max_queued": self.queued,
            "daily_pictures": self.daily,
            "weight": self.weight,
        }


AS_SET: Final = KeyLimits()


@dataclass(frozen=True, slots=True)
class Used:
    """What a key has used of its limits: the columns of that name."""

    rate_at: float  # milliseconds: its requests so far are paid for up to then
    spent: float  # default pictures' worth, on the day ``spent_on``
    spent_on: int  # days since 1970, UTC


@dataclass(frozen=True, slots=True)
class Account:
    """A locked key: the moment by the database's clock, its limits, and what it has used of them."""

    now: int  # milliseconds since 1970
    own: KeyLimits
    limits: Limits
    used: Used

    @classmethod
    def locked(
        cls, db: Connection, statements: Mapping[str, TextClause], key_id: str, limits: Limits = NO_LIMITS
    ) -> Account:
        """Lock a key's row until the transaction ends, and read it.

        Raises:
            Unauthorized: The key does not exist, was revoked or has expired.
        """
        row = db.execute(statements["lock_key"], {"key_id": key_id}).mappings().first()
        if row is None:
            raise Unauthorized("this API key was revoked or has expired; use another")
        used = Used(float(row["rate_at"]), float(row["spent"]), int(row["spent_on"]))
        return cls(int(row["now"]), KeyLimits.from_row(row), limits, used)

    def counted(self) -> Account:
        """Return the account after one more request; up to a minute's worth may come at once.

        The generic cell rate algorithm, in its virtual scheduling form (ITU-T I.371, annex A).

        Raises:
            TooManyRequests: It comes too early; ``retry_after`` says when it would not.
        """
        rate = self.limits.rate if self.own.rate is None else self.own.rate
        if not rate:
            return self
        due = max(self.used.rate_at, self.now) + MINUTE / rate
        early = due - (self.now + MINUTE)
        if early > 0.5:  # half a millisecond, for the sums of many fractions
            seconds = max(1, math.ceil(early / 1000))
            raise TooManyRequests(
                f"this key may send {rate} requests a minute; send the next in {seconds} seconds", seconds
            )
        return replace(self, used=replace(self.used, rate_at=due))

    def spent(self, cost: float) -> Account:
        """Return the account after work of ``cost`` default pictures.

        Raises:
            BadRequest: It is more than a whole day's.
            TooManyRequests: It is more than what is left of the day.
        """
        daily = self.limits.daily if self.own.daily is None else self.own.daily
        today = self.now // DAY
        spent = self.used.spent if self.used.spent_on == today else 0.0
        if daily and cost > daily:
            raise BadRequest(
                f"this request is as much work as {cost:.3g} default pictures and this key may have {daily:.3g} a day; "
                "ask for fewer or smaller pictures, or fewer steps"
            )
        if daily and spent + cost > daily * (1 + 1e-9):
            seconds = math.ceil(((today + 1) * DAY - self.now) / 1000)
            raise TooManyRequests(
                f"this key may have the work of {daily:.3g} default pictures a day (UTC) and had {spent:.3g} today; "
                f"this request is {cost:.3g} more: send it in {seconds} seconds, when the next day begins",
                seconds,
            )
        return replace(self, used=replace(self.used, spent=spent + cost, spent_on=today))

    def check_queues(self, db: Connection, statements: Mapping[str, TextClause], key_id: str, max_queued: int) -> None:
        """Refuse a job more where the key's queue or everybody's is full.

        Raises:
            TooManyRequests: The key's own, of ``max_queued`` jobs where it has no number of its own.
            Unavailable: Everybody's.
        """
        most = max_queued if self.own.queued is None else self.own.queued
        if most and db.execute(statements["count_waiting_of_key"], {"key_id": key_id}).scalar_one() >= most:
            raise TooManyRequests(f"{most} jobs of this key are waiting; send more when some have finished")
        most = self.limits.waiting
        if most and db.execute(statements["count_waiting"], {"most": most}).scalar_one() >= most:
            raise Unavailable(
                f"{most} jobs are waiting on this server, and it takes no more; send it again in a while",
                CROWDED_SECONDS,
            )

    def to_row(self) -> dict[str, Any]:
        """Return what the key has used, as columns of ``keys``, and what a claim must know of the settings."""
        return {**asdict(self.used), "default_running": self.limits.running}


def count_request(
    db: Connection, statements: Mapping[str, TextClause], key_id: str, limits: Limits = NO_LIMITS
) -> None:
    """Lock a key and count one request that makes no job, such as an upload.

    Raises:
        Unauthorized, TooManyRequests: As ``Account``.
    """
    account = Account.locked(db, statements, key_id, limits)
    counted = account.counted()
    if counted != account:
        db.execute(statements["note_request"], {"id": key_id, "rate_at": counted.used.rate_at})
