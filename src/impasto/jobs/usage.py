"""How much a key has used: its predictions counted by model, day and status.

Knows rows that are still kept. Knows nothing of money: none is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final

from sqlalchemy import Engine

from impasto.jobs.database import reading
from impasto.jobs.queries import queries
from impasto.jobs.records import moment
from impasto.jobs.states import Status

_DAY: Final = 86_400_000  # milliseconds


@dataclass(frozen=True, slots=True)
class Used:
    """Predictions of one model that were submitted on one day (UTC) and stand at one status now."""

    model: str
    day: date
    status: Status
    count: int


class UsageCounter:
    """Counts in one database. Raises ``Unavailable`` when the database cannot answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)

    def used(self, key_id: str, since: datetime, until: datetime) -> list[Used]:
        """Return the counts of a key's predictions, the oldest day first.

        Args:
            key_id: Whose.
            since: Submitted then or later.
            until: Submitted then or earlier.
        """
        values = {"key_id": key_id, "since": _milliseconds(since), "until": _milliseconds(until)}
        with reading(self._engine) as db:
            rows = db.execute(self._queries["usage_of_key"], values).all()
        return [Used(row.model, moment(row.day * _DAY).date(), Status(row.status), row.number) for row in rows]


def _milliseconds(when: datetime) -> int:
    return int(when.astimezone(UTC).timestamp() * 1000)
