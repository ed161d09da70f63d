"""What each acceleration leaves out, as data: which steps reuse deep features, and which go without guidance.

Knows requests and shares of the steps. Knows no tensors and no networks.

The first steps decide what stands where, so nothing is reused in them; with few steps neighbours differ too much, so
features are reused over a share of the way and not over a number of steps. How far the pictures drift, and how the
values were found, is told in ``docs/speed.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from impasto.types import LIMITS, Acceleration, GenerationRequest


@dataclass(frozen=True, slots=True)
class Preset:
    """What an acceleration stands for; the defaults are exact. Shares are of all steps of a schedule, from 0 to 1.

    Attributes:
        reach: Share over which deep features are used again; what is less than two steps reuses nothing.
        warm: Share of the steps before any are.
        guidance_start: Share of the steps before guidance sets in.
        guidance_end: Share of the steps after which it ends.
    """

    reach: float = 0.0
    warm: float = 0.0
    guidance_start: float = LIMITS.guidance_start.default
    guidance_end: float = LIMITS.guidance_end.default

    def reuse(self, steps: int) -> int:
        """Return how many steps share deep features, of so many."""
        return max(1, min(int(LIMITS.reuse_features.high), round(self.reach * steps)))


PRESETS: Final[Mapping[Acceleration, Preset]] = {
    "exact": Preset(),
    "balanced": Preset(reach=0.1, warm=0.1),  # of 30 steps 3 and then every third are whole
    "fast": Preset(reach=1 / 6, warm=0.1),  # 3 and then every fifth
}


@dataclass(frozen=True, slots=True)
class Pace:
    """Which calls of a request's images are whole, and which are guided."""

    reuse: int = 1  # calls that share deep features
    warm: float = 0.0  # share of the calls before any do
    guidance_start: float = LIMITS.guidance_start.default
    guidance_end: float = LIMITS.guidance_end.default

    @property
    def reuses(self) -> bool:
        """Whether deep features are worth keeping."""
        return self.reuse > 1

    def guides(self, share: float) -> bool:
        """Whether guidance is on when this share of the calls is done: it may be limited to an interval.

        Source of the interval: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
        """
        return self.guidance_start <= share < self.guidance_end

    def whole(self, call: int, first: int, total: int) -> bool:
        """Whether a call computes its own deep features.

        Args:
            call: Its place on its trajectory; ``first``: that of the first one that is made.
            total: Calls of the whole trajectory.
        """
        start = max(first, round(self.warm * total))
        return call < start or (call - start) % self.reuse == 0


def pace_of(request: GenerationRequest) -> Pace:
    """Return what a request asks for: its acceleration, and before that whatever of it the request says itself."""
    preset = PRESETS[request.acceleration]
    reuse, start, end = request.reuse_features, request.guidance_start, request.guidance_end
    return Pace(
        reuse=preset.reuse(request.num_inference_steps) if reuse is None else reuse,
        warm=preset.warm,
        guidance_start=preset.guidance_start if start is None else start,
        guidance_end=preset.guidance_end if end is None else end,
    )
