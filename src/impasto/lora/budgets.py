"""How much memory may be spent on making LoRA switches fast.

Knows bytes. Knows no files, networks or devices: whoever asks says what is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

GIB: Final = 2**30
SHARE: Final = 8  # one part in so many of what is free
MOST_PARSED: Final = 4 * GIB
MOST_GROUPED: Final = GIB // 4  # 40 weights of 1280 by 1280; more in one product saves no time
MOST_PREPARED: Final = 16 * GIB  # three sets of patched weights for all attention layers of SDXL in 16 bits


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that may be kept to make switches fast; none is needed for them to be right.

    Attributes:
        parsed: Files' patches in main memory.
        prepared: Factors, or whole patched weights, of the sets used last, on the networks' device.
        own: The model's own values of weights that are not patched now; ``None``: as many as were ever patched.
        own_on: Where own values are kept; ``None``: beside the weights.
        group: Float32 numbers in which weights of one shape are worked out together, for the moment; 0: one by one.
        group_on: Types of devices where they are worked out together.
    """

    parsed: int = 2 * GIB
    prepared: int = 2 * GIB
    own: int | None = None
    own_on: torch.device | None = None
    group: int = MOST_GROUPED
    group_on: frozenset[str] = frozenset({"cuda"})

    @classmethod
    def within(
        cls, main: int | None, device: int | None, parsed: int | None = None, prepared: int | None = None
    ) -> Budgets:
        """Choose budgets for a machine: an eighth of what is free, within bounds.

        Args:
            main: Free bytes of main memory; ``None``: unknown.
            device: Free bytes where the networks are; ``None``: unknown.
            parsed: What the operator wants instead.
            prepared: The same.
        """
        return cls(
            parsed=_share(main, MOST_PARSED) if parsed is None else parsed,
            prepared=_share(device, MOST_PREPARED) if prepared is None else prepared,
            group=min(_share(device, MOST_GROUPED), MOST_GROUPED),
        )


def _share(free: int | None, most: int) -> int:
    return GIB if free is None else min(free // SHARE, most)
