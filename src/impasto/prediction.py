"""What a server of ours tells of a job: the prediction object, and the events of its stream.

Knows their form (``docs/api.md``, ``docs/progress.md``). Knows no routes and dials nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from httpx_sse import ServerSentEvent

from impasto.errors import PredictionFailed


@dataclass(frozen=True, slots=True)
class Prediction:
    """A job of the server, as it was when it was read.

    Attributes:
        id: Its id there.
        status: ``created``, ``processing``, ``completed`` or ``failed``.
        outputs: Addresses of its pictures.
        flagged: Whether the safety checker flagged each.
        seed: The seed in use; picture ``i`` is of seed + i.
        error: Why it failed; empty unless it did.
        loras: The report of each LoRA, as ``docs/api.md`` has it.
        queue_position: Its place among those that wait; 1 is next.
        data: Everything the server said of it.
    """

    id: str
    status: str
    outputs: tuple[str, ...] = ()
    flagged: tuple[bool, ...] = ()
    seed: int = -1
    error: str = ""
    loras: tuple[Mapping[str, Any], ...] = ()
    queue_position: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Read the prediction object."""
        return cls(
            id=data["id"],
            status=data["status"],
            outputs=tuple(data.get("outputs") or ()),
            flagged=tuple(data.get("has_nsfw_contents") or ()),
            seed=int(data.get("seed", -1)),
            error=data.get("error") or "",
            loras=tuple(data.get("loras") or ()),
            queue_position=data.get("queue_position"),
            data=data,
        )

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("completed", "failed")

    def check(self) -> Self:
        """Return itself, unless it failed.

        Raises:
            PredictionFailed: With the server's own words.
        """
        if self.status == "failed":
            raise PredictionFailed(self.error or "the server gives no reason; its log has one")
        return self


@dataclass(frozen=True, slots=True)
class Step:
    """How far a job is."""

    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A small, rough picture of what image ``index`` is becoming."""

    index: int
    image: bytes = field(repr=False)  # a JPEG file


Update = Prediction | Step | Glimpse


def read_event(event: ServerSentEvent) -> Update | None:
    """Return what an event tells, or ``None`` for one that tells nothing or is of a later server."""
    if not event.data:  # says how long to wait before coming back, and nothing else
        return None
    data = json.loads(event.data)
    match event.event:
        case "status":
            return Prediction.of(data)
        case "progress":
            return Step(int(data["step"]), int(data["total"]))
        case "preview":
            return Glimpse(int(data["index"]), base64.b64decode(data["image"]))
    return None
