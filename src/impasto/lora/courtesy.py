"""Work beside the thread that moves pictures, which goes first.

Knows time. Knows nothing of files, networks or what the work is.

The physics: Python runs one thread at a time, and a step is thousands of small calls, each of which lets go of that
turn and asks for it again. Whoever works through meanwhile makes each of them wait for up to 5 ms, so a file of half a
second's work in Python holds up the others for about as long as if they did it themselves. A thread that rests for four
fifths of its time, every half a millisecond, slows them by its fifth, spread over some steps, and stops nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

SHARE: Final = 0.2  # of its time that a courteous thread works
STRETCH: Final = 0.0005  # seconds of work between two rests
LONGEST: Final = 0.05  # seconds of a rest, however long the work before it was


class Courtesy:
    """When a thread rests.

    Args:
        busy: Whether anybody is held up now; while nobody is, there is no rest.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._rested = time.thread_time()

    def give_way(self) -> None:
        """Rest, if it is time to."""
        worked = time.thread_time() - self._rested
        if worked < STRETCH:
            return
        if self._busy():
            time.sleep(min(LONGEST, worked * (1 / SHARE - 1)))
        self._rested = time.thread_time()


_COURTESY: Final[ContextVar[Courtesy | None]] = ContextVar("courtesy", default=None)


@contextmanager
def courteous(busy: Callable[[], bool]) -> Iterator[None]:
    """Let ``give_way`` rest in this thread while others are ``busy``."""
    before = _COURTESY.set(Courtesy(busy))
    try:
        yield
    finally:
        _COURTESY.reset(before)


def give_way() -> None:
    """Let others go first, where this thread is a courteous one; called between pieces of work."""
    courtesy = _COURTESY.get()
    if courtesy is not None:
        courtesy.give_way()
