"""Finished answers that are large: made once, kept as bytes that are ready to be sent, up to a total size.

Knows keys, bytes and the longest unused. Knows nothing of what is in an answer. Encoding a picture of 2 MB and writing
it into JSON takes several milliseconds of the interpreter, in which nobody else is answered; sending bytes takes none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable


class FinishedAnswers:
    """Answers by key. Safe to share between threads; of several that want the same one, the first makes it.

    Args:
        limit: Bytes of all kept answers together; the longest unused go first, and one that is larger is not kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards all below
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self.size = 0  # bytes kept

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """Return the answer for ``key``, made by ``make`` unless it is kept; in a thread, because that takes long."""
        with self._lock:
            if found := self._found(key):
                return found
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if found := self._found(key):
                    return found
            try:
                made = make()
            finally:
                with self._lock:
                    self._making.pop(key, None)
            with self._lock:
                self._keep(key, made)
        return made

    def _found(self, key: Hashable) -> bytes | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _keep(self, key: Hashable, made: bytes) -> None:
        if key in self._kept or len(made) > self._limit:
            return
        self._kept[key] = made
        self.size += len(made)
        while self.size > self._limit:
            self.size -= len(self._kept.popitem(last=False)[1])
