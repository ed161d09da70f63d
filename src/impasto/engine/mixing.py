"""How patient waiting rows should be while LoRA sets take turns: from what switches and steps were seen to cost.

Knows seconds and counts. Knows no tensors, rows or weights, so a property test can drive it.

The physics: with ``n`` sets in flight each is served about once in ``patience`` turns, which is ``n`` switches. A
set that stays on for ``k`` steps of ``t`` seconds after a switch of ``s`` seconds spends the share ``s / (s + k t)``
on switching. So patience of ``n k`` turns keeps the share where it should be; more would only let rows wait. On a CPU
a full-size step takes minutes and a switch a second, so ``k`` is 1 and nothing changes; on a GPU both take tens of
milliseconds, and staying pays. Staying without more patience was simulated as well: it saves nothing, because the
scheduler prefers the shortest job and so stays by itself until somebody's patience ends.

Where steps are short, patience is counted in seconds: whoever is passed over for a few of them loses nothing, while
turns for everybody make every job end late and switch at each turn (``benchmarks/LOG.md`` has the simulation).
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from impasto.engine.scheduler import PATIENCE

MOST_SHARE = 0.1  # of the time that switching should take
PATIENCE_SECONDS = 4.0  # that a row may be passed over at any rate
MOST_PATIENCE = 256  # turns that a row may be passed over, however dear switches are and however short steps
REMEMBERED = 15  # measurements; the median of the latest ones, so that one slow first call does not count


class SwitchCosts:
    """Learns what a switch and a step cost, and tells how long rows of other sets should be let wait.

    Args:
        share: The part of the time that switching should take at most, between 0 and 1.
        most_patience: Turns that a row may be passed over at most; this bound comes before ``share``.
    """

    def __init__(self, share: float = MOST_SHARE, most_patience: int = MOST_PATIENCE) -> None:
        if not 0 < share < 1:
            raise ValueError("share must be between 0 and 1")
        if most_patience < PATIENCE:
            raise ValueError(f"most_patience must be at least {PATIENCE}")
        self._share = share
        self._most_patience = most_patience
        self._switches: deque[float] = deque(maxlen=REMEMBERED)
        self._steps: deque[float] = deque(maxlen=REMEMBERED)

    def learn_switch(self, seconds: float) -> None:
        """Note what a switch took, and made the call after it take longer."""
        self._switches.append(max(0.0, seconds))

    def learn_step(self, seconds: float) -> None:
        """Note what a step took, the switch before it not counted."""
        self._steps.append(max(0.0, seconds))

    @property
    def stay(self) -> float:
        """Fewest steps between two switches that keep switching within its share; 1 until both costs are known."""
        if not self._switches or not self._steps:
            return 1
        switch, step = statistics.median(self._switches), self._step
        least = switch * (1 - self._share) / self._share
        if least <= step:
            return 1
        return math.ceil(least / step) if step > 0 and math.isfinite(least / step) else math.inf

    def patience(self, sets: int) -> int:
        """Turns that a row may be passed over while rows of so many sets are in flight."""
        if not self._steps:
            return PATIENCE
        turns = PATIENCE_SECONDS / self._step if self._step else math.inf
        return int(min(self._most_patience, max(PATIENCE, turns, sets * self.stay if sets > 1 else 0)))

    @property
    def _step(self) -> float:
        return statistics.median(self._steps)
