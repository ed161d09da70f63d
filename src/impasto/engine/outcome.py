"""What becomes of requests, as events.

Knows events and errors. Knows no engine and no networks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from impasto.errors import ImpastoError
from impasto.types import Event, Failed

log = logging.getLogger(__name__)


def failed(request_id: str, error: Exception) -> Failed:
    """End a request. The traceback goes to the log and no further: its frames hold the failed call's memory."""
    if not isinstance(error, ImpastoError):
        log.error("request %s failed", request_id, exc_info=error)
    return Failed(request_id, error.with_traceback(None))


def apart(events: Sequence[Event], request_id: str) -> tuple[list[Event], list[Event]]:
    """Divide events into those of one request and the rest."""
    mine = [event for event in events if event.request_id == request_id]
    return mine, [event for event in events if event.request_id != request_id]
