"""A sign of life from a worker process to its supervisor, so that one that is frozen as a whole is noticed.

Knows a pipe. Knows nothing of jobs: a backend that hangs is noticed inside the process (``heartbeat.py``); this is for
a process in which no thread runs any more, because it was stopped or a library holds Python's lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import Final

PULSE_SECONDS: Final = 1.0
SILENCE_SECONDS: Final = 120.0  # after which a process that has had a pulse counts as dead


def start_pulse(descriptor: int) -> None:
    """Write a byte to a pipe every ``PULSE_SECONDS``, from a thread of its own, until nobody reads it."""
    os.set_inheritable(descriptor, False)  # the end of this process is the end of the pipe
    os.set_blocking(descriptor, False)
    threading.Thread(target=_beat, args=(descriptor,), name="pulse", daemon=True).start()


def _beat(descriptor: int) -> None:
    while True:
        try:
            with contextlib.suppress(BlockingIOError):  # full: our supervisor is slow, not gone
                os.write(descriptor, b".")
        except OSError:
            return
        time.sleep(PULSE_SECONDS)


class Pulse:
    """The supervisor's end of the pipe; the other, ``theirs``, goes to the process."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.pipe()
        self._poll = select.poll()  # select() takes no descriptors above 1023, and a busy server has those
        self._poll.register(self._ours, select.POLLIN)
        self.ended = False  # the process has closed its end, as it does when it dies
        self._heard: float | None = None  # time.monotonic()

    def silent(self, seconds: float) -> bool:
        """Listen for up to ``seconds``; return whether there was a pulse once, and none for ``SILENCE_SECONDS``."""
        if self._poll.poll(seconds * 1000):
            self.ended = not os.read(self._ours, 4096)
            self._heard = time.monotonic()
        return self._heard is not None and time.monotonic() - self._heard > SILENCE_SECONDS

    def close_theirs(self) -> None:
        """Leave that end to the process alone."""
        os.close(self.theirs)

    def close(self) -> None:
        """Listen no more."""
        os.close(self._ours)
