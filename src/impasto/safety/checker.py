"""What every checker does: look at pictures and give a verdict on each.

Knows the words for it, and how several checkers become one. Knows no network, no threshold of any checker, and not
what becomes of a flagged picture (``action.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a checker says of one picture.

    Raises:
        ValueError: The score is no number: broken weights must never read as harmless.
    """

    flagged: bool
    score: float  # what was compared with the threshold, from 0, harmless, to 1
    checker: str  # who says so
    categories: Mapping[str, float] = field(default_factory=dict)  # the checker's own scores, by its own names

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ValueError(f"checker {self.checker} gave the score {self.score}")


class ImageChecker(Protocol):
    """Looks at finished pictures; whatever it raises means that the pictures are not shown."""

    @property
    def name(self) -> str:
        """Short, for the log."""

    @property
    def version(self) -> str:
        """Changes when the same picture may get another verdict: release, commit or threshold."""

    def check(self, images: Sequence[Image]) -> list[Verdict]:
        """Return one verdict for each RGB picture, in their order."""


class Combined:
    """Several checkers as one: a picture that any of them flags is flagged."""

    def __init__(self, checkers: Sequence[ImageChecker]) -> None:
        self._checkers = tuple(checkers)
        self.name = ",".join(checker.name for checker in checkers)
        self.version = ",".join(checker.version for checker in checkers)

    def check(self, images: Sequence[Image]) -> list[Verdict]:
        """Return for each picture the verdict that counts: a flagged one, else the one with the highest score."""
        columns = zip(*(checker.check(images) for checker in self._checkers), strict=True)
        return [max(verdicts, key=lambda verdict: (verdict.flagged, verdict.score)) for verdicts in columns]
