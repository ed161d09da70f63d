"""How the processes of the service log: to standard error, one record a line, as text or as JSON.

Knows levels, forms, and what is known of the request that a record belongs to. Knows nothing of what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal

from impasto.redaction import RedactingFormatter, redacted

FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
NOISY: Final = ("alembic", "httpx", "urllib3")  # libraries whose "info" is of no use to an operator
TOLD: Final = ("request_id", "prediction_id", "key_id")  # of a request, in each of its records

_facts: ContextVar[dict[str, Any] | None] = ContextVar("facts", default=None)


def begin_facts(facts: dict[str, Any]) -> None:
    """Have what follows in this task, its children and its threads belong to a request of which ``facts`` are known."""
    _facts.set(facts)


def note(**facts: Any) -> None:
    """Add to what is known of the request that this is done for; outside of one, nothing happens."""
    known = _facts.get()
    if known is not None:
        known.update(facts)


def told() -> dict[str, str]:
    """Return what a record says of its request."""
    known = _facts.get() or {}
    return {name: known[name] for name in TOLD if known.get(name)}


class TextFormatter(RedactingFormatter):
    """A line for people, with the request's facts at its end."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """Return the line without a trace."""
        facts = " ".join(f"{name}={value}" for name, value in told().items())
        line = super().formatMessage(record)
        return f"{line} [{facts}]" if facts else line


class JsonFormatter(logging.Formatter):
    """A JSON object for programs: ``time``, ``level``, ``logger``, ``message``, the request's facts, ``trace``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, on one line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redacted(record.getMessage()),
            **told(),
        }
        if record.exc_info:
            entry["trace"] = redacted(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


def set_up_logging(level: str, form: Literal["text", "json"] = "text") -> None:
    """Log everything from ``level`` (``debug``, ``info``, ``warning``, ``error``) on."""
    handler = logging.StreamHandler(sys.stderr)
    # Both take secrets out of what they write: nobody need remember what is one.
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
