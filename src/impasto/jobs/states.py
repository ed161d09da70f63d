"""The life of a job: its states, the moves between them, and how one attempt at it can end.

Knows names and rules. Knows nothing of rows, workers or time: the statements of ``sql/predictions.sql`` make the
moves, guarded by state.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from impasto.errors import IllegalMove


class Status(enum.StrEnum):
    """Where a job stands; the value is what the database holds."""

    CREATED = "created"
    """Accepted and waiting for a worker, for the first time or again after one was lost."""

    PROCESSING = "processing"
    """Held by one worker under a lease."""

    COMPLETED = "completed"
    """Finished; its outputs can be fetched."""

    FAILED = "failed"
    """Given up; its error says why."""

    CANCELLED = "cancelled"
    """Stopped because its owner asked."""


class Outcome(enum.StrEnum):
    """How one attempt of one worker ended."""

    OK = "ok"
    """The worker delivered."""

    ERROR = "error"
    """The worker said that the job cannot be done."""

    LEASE_LOST = "lease_lost"
    """The worker fell silent; only these count against the job's number of attempts."""

    CANCELLED = "cancelled"
    """The owner's cancel reached the job while a worker held it."""

    RELEASED = "released"
    """The worker handed the job back unharmed, as it does before it stops."""


TERMINAL: Final = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})
"""States that nothing leaves."""

NEXT: Final[Mapping[Status, frozenset[Status]]] = {
    Status.CREATED: frozenset({Status.PROCESSING, Status.CANCELLED}),
    Status.PROCESSING: frozenset({Status.CREATED}) | TERMINAL,
    **{status: frozenset[Status]() for status in TERMINAL},
}
"""The legal moves out of each state."""


def check_move(here: Status, there: Status) -> None:
    """Do nothing if a job may go from ``here`` to ``there``.

    Raises:
        IllegalMove: It may not.
    """
    if there not in NEXT[here]:
        raise IllegalMove(f"a job cannot go from {here} to {there}")
