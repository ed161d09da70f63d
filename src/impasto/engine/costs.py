"""What network calls and LoRA switches take on this machine, as measured, and what follows for whose turn it is.

Knows sizes by any hashable name, counts and seconds. Knows no tensors, rows or weights.
"""

from __future__ import annotations

from collections.abc import Hashable

from impasto.engine.batching import BatchTimes
from impasto.engine.mixing import SwitchCosts


class Costs:
    """Learns from each call; tells how many images should share one and how patient waiting ones should be."""

    def __init__(self) -> None:
        self._switches = SwitchCosts()
        self._calls = BatchTimes()

    def learn(self, size: Hashable, images: int, seconds: float, switch: float | None) -> None:
        """Note a call.

        Args:
            size: What its time depends on, besides the images.
            images: That shared it.
            seconds: It took, without the switch before it.
            switch: Seconds of that switch, if there was one. What the call took longer than others of its kind is
                counted with it: packed weights, say, are packed anew by the first call that wants them.
        """
        usual = self._calls.usual(size, images)
        if switch is not None:
            self._switches.learn_switch(switch + max(0.0, seconds - (usual or seconds)))
        if switch is None or usual is None:
            self._switches.learn_step(seconds)
            self._calls.learn(size, images, seconds)

    def share(self, size: Hashable, ready: int) -> int:
        """How many of the images that are ready should share the next call."""
        return self._calls.choose(size, ready)

    def patience(self, sets: int) -> int:
        """Turns that a row may be passed over while rows of so many LoRA sets are in flight."""
        return self._switches.patience(sets)
