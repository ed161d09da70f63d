"""How many images should share a network call, from what calls of each number were measured to take. Pure Python.

Knows sizes by any hashable name, counts and seconds. Knows no tensors and no policy of who goes first.

The physics: where a call of two images takes twice as long as a call of one (a CPU, or a large picture on a GPU),
sharing makes nobody's picture come sooner and keeps the shorter job waiting for the longer; where small calls leave the
device idle, sharing is nearly free. Which of them it is depends on the machine, the model and the size, so it is
measured: the fewest images go together that come near the best measured rate.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable
from typing import Final

NEAR: Final = 0.92  # of the best rate: what a call of fewer images may lose
MEASURED: Final = 3  # calls of a number before it is judged: the first ones of a size warm up
REMEMBERED: Final = 9  # the median of the latest ones
EXPLORE: Final = 8  # of so many choices one measures a number that is not known yet
RENEW: Final = 64  # of so many one measures any number again: what a call takes changes with what else runs


class BatchTimes:
    """Learns what network calls take, and tells how many images should share the next."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, dict[int, deque[float]]] = {}
        self._choices: dict[Hashable, int] = {}

    def learn(self, size: Hashable, images: int, seconds: float) -> None:
        """Note what a call of so many images of a size took."""
        counts = self._seconds.setdefault(size, {})
        counts.setdefault(images, deque(maxlen=REMEMBERED)).append(max(seconds, 1e-9))

    def usual(self, size: Hashable, images: int) -> float | None:
        """Seconds that a call of so many images of a size usually takes; ``None`` until that is known."""
        seconds = self._seconds.get(size, {}).get(images, ())
        return statistics.median(seconds) if len(seconds) >= MEASURED else None

    def choose(self, size: Hashable, ready: int) -> int:
        """Return how many of ``ready`` images, at least 1, should share the next call: all, until fewer are known."""
        known = {count: self.usual(size, count) for count in candidates(ready)}
        counts, unknown = list(known), [count for count, seconds in known.items() if seconds is None]
        turn = self._choices[size] = self._choices.get(size, 0) + 1
        if unknown and turn % EXPLORE == 0:
            return unknown[-1]
        if turn % RENEW == 0:
            return counts[turn // RENEW % len(counts)]
        if ready in unknown:
            return ready
        rates = {count: count / seconds for count, seconds in known.items() if seconds is not None}
        return min(count for count, rate in rates.items() if rate >= NEAR * max(rates.values()))


def candidates(ready: int) -> list[int]:
    """The numbers of images that are worth knowing: all that are ready, and its halvings."""
    counts = [ready]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return counts
