"""The outbox of webhooks: which ended jobs have still to be told to whom.

Knows rows, leases and when the next try is due. Knows nothing of HTTP, signatures or what an event says.

An event is written in the transaction that ends its job, so neither is ever there without the other. A deliverer takes
events under a lease; if it dies, they come free again, so an event may be sent twice and is never lost.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine

from impasto.jobs.database import reading, writing
from impasto.jobs.queries import queries

MAX_ERROR_CHARS: Final = 500


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """An ended job that somebody is to be told of; the holder has until its lease ends."""

    id: str  # the same in all tries
    prediction_id: str
    url: str
    attempt: int  # this try's number, from 1; older ones can no longer write


def record_webhook(db: Connection, job_id: str) -> None:
    """Write the event of a job that ends in this transaction, if it names an address."""
    statement = queries(db.dialect.name)["record_webhook"]
    db.execute(statement, {"id": job_id, "webhook_id": f"msg_{secrets.token_hex(16)}"})


class WebhookStore:
    """The events of one database. Every method raises ``Unavailable`` when the database cannot answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)

    def claim(self, limit: int, lease_seconds: float) -> list[WebhookEvent]:
        """Take up to ``limit`` events that are due; no two callers hold one at once."""
        with reading(self._engine) as db:
            if db.execute(self._queries["any_webhook_due"]).first() is None:
                return []
        with writing(self._engine) as db:
            values = {"limit": limit, "lease": _milliseconds(lease_seconds)}
            rows = db.execute(self._queries["claim_webhooks"], values).all()
        return [WebhookEvent(row.id, row.prediction_id, row.url, row.attempt) for row in rows]

    def delivered(self, event: WebhookEvent) -> None:
        """Note that the address took the event."""
        self._settle("webhook_delivered", event)

    def retry(self, event: WebhookEvent, pause_seconds: float, error: str) -> None:
        """Note a failed try; the next is due in ``pause_seconds``."""
        self._settle("retry_webhook", event, pause=_milliseconds(pause_seconds), error=error[:MAX_ERROR_CHARS])

    def give_up(self, event: WebhookEvent, error: str) -> None:
        """Note that no more tries follow."""
        self._settle("give_up_webhook", event, error=error[:MAX_ERROR_CHARS])

    def _settle(self, statement: str, event: WebhookEvent, **values: str | int) -> None:
        with writing(self._engine) as db:
            db.execute(self._queries[statement], {"id": event.id, "attempt": event.attempt, **values})


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
