"""Which images move at the next denoising step: buckets, fairness, and a bound on waiting. Pure Python.

Knows row ids, what must agree for rows to share a network call, how many steps each still needs, and their weight.
Knows no tensors: a property test drives it through thousands of schedules a second.

The policy: the row that has the least left to do goes first, so short jobs overtake long ones; a row that
was passed over ``patience`` times goes before everything else, longest wait first, so nothing starves. With ``n``
rows in flight no row waits more than ``patience + n`` turns between two of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

PATIENCE = 8  # turns a row may be passed over by shorter ones


@dataclass(slots=True)
class Ticket:
    """One image waiting for its next step."""

    row_id: int
    bucket: Hashable  # rows with equal buckets may share a network call
    remaining: int  # steps still to run, at least 1
    weight: float = 1.0  # what a step of it costs beside one of the others
    waited: int = field(default=0)  # turns since it last moved


class Scheduler:
    """Chooses, turn by turn, the rows of the next network call.

    Args:
        max_batch: Most rows that may share a call.
        patience: Turns a row may be passed over before it goes first.
    """

    def __init__(self, max_batch: int, patience: int = PATIENCE) -> None:
        if max_batch < 1:
            raise ValueError("max_batch must be at least 1")
        self._max_batch = max_batch
        self.patience = patience  # may change between turns; the bound on waiting is of the largest since a row came
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, row_id: int, bucket: Hashable, remaining: int, weight: float = 1.0) -> None:
        """Let a row take part from the next turn on; ``weight`` is what a step of it costs beside one of the others."""
        if row_id in self._tickets or remaining < 1:
            raise ValueError(f"row {row_id}: already here, or nothing left to do")
        self._tickets[row_id] = Ticket(row_id, bucket, remaining, weight)

    def move(self, row_id: int, bucket: Hashable) -> None:
        """Put a row that is still here into another bucket: its next call is of another kind."""
        self._tickets[row_id].bucket = bucket

    def discard(self, rows: Iterable[int]) -> None:
        """Forget rows that were cancelled or failed; unknown ids are fine."""
        for row_id in rows:
            self._tickets.pop(row_id, None)

    def next_rows(self, share: Callable[[int, int], int] = lambda first, ready: ready) -> list[int]:
        """Choose the rows of the next call, at most ``max_batch`` of one bucket; empty when nothing waits.

        The chosen rows count as moved: a row that has run its last step is forgotten.

        Args:
            share: Of the row that goes first, and how many could go with it, itself included: how many shall, at
                least 1.
        """
        if not self._tickets:
            return []
        first = min(self._tickets.values(), key=self._urgency)
        same = [ticket for ticket in self._tickets.values() if ticket.bucket == first.bucket]
        ready = sorted(same, key=self._urgency)[: self._max_batch]
        chosen = ready[: max(1, share(first.row_id, len(ready)))]
        self._advance(chosen)
        return [ticket.row_id for ticket in chosen]

    def _urgency(self, ticket: Ticket) -> tuple[int, float, int]:
        """Sort key, smallest first: the starved by length of wait, then the shortest, then the oldest."""
        if ticket.waited >= self.patience:
            return (0, -ticket.waited, ticket.row_id)
        return (1, ticket.remaining * ticket.weight, ticket.row_id)

    def _advance(self, chosen: list[Ticket]) -> None:
        for ticket in self._tickets.values():
            ticket.waited += 1
        for ticket in chosen:
            ticket.waited = 0
            ticket.remaining -= 1
            if ticket.remaining == 0:
                del self._tickets[ticket.row_id]
