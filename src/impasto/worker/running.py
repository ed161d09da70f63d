"""A job while a worker has it.

Knows the job, its lease, what it has come to so far, and which of that is news. Knows no store and no backend.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from impasto.jobs.events import PREVIEW_COUNT, encode_previews
from impasto.jobs.records import Job, Lease, Output
from impasto.types import Preview, Progress
from impasto.worker.loras import FoundLora
from impasto.worker.previews import thumbnail
from impasto.worker.provenance import Recipe

PREVIEW_SECONDS: Final = 0.5  # between two previews of a job


@dataclass(slots=True, eq=False)
class Running:
    """A job in the backend, or waiting to get there."""

    job: Job
    lease: Lease
    claimed: float  # time.monotonic()
    outputs: dict[int, Output] = field(default_factory=dict)  # by image index
    progress: dict[str, Any] = field(default_factory=dict)
    loras: tuple[FoundLora, ...] = ()  # as the request orders them; their files stay for as long as this lives
    recipe: Recipe | None = None  # what its pictures' files and its row tell
    ended: threading.Event = field(default_factory=threading.Event)  # nobody waits for its files any more
    _previews: dict[int, Preview] = field(default_factory=dict)  # the last of each image
    _fresh: bool = False  # some of them were not shown yet
    _shown: int = 0  # times that previews were shown
    _shown_at: float = 0.0  # time.monotonic()

    @property
    def suspect(self) -> bool:
        """Whether a worker died while it ran this job: it may be this job that kills workers."""
        return self.job.deaths > 0

    @property
    def wants_check(self) -> bool:
        """Whether the request wants its pictures checked; one that does not say wants it."""
        return bool(self.job.input["output"].get("safety_checker", True))

    @property
    def wants_metadata(self) -> bool:
        """Whether the request has nothing against parameters in its pictures' files."""
        return bool(self.job.input["output"].get("metadata", True))

    @property
    def made(self) -> Mapping[str, Any] | None:
        """What its row tells of how its pictures were made."""
        return self.recipe.record if self.recipe else None

    def text(self, seed: int) -> str | None:
        """Return what the file of the picture with this seed tells."""
        return self.recipe.text(seed) if self.recipe else None

    def signed(self, data: bytes, content_type: str) -> bytes:
        """Return a picture's file with its credentials, where the operator has it signed."""
        return self.recipe.signed(data, content_type) if self.recipe else data

    def named(self, report: Any) -> Any:
        """Put the name the user gave into a LoRA's report, which knows our file alone, and what the name led to."""
        found = self.loras[report.position]
        asked: str = self.job.input["request"]["loras"][report.position]["path"]
        return report.named(asked, found.source, found.alias_of)

    @property
    def blobs(self) -> list[str]:
        """The pictures this attempt has stored."""
        return [output.blob for output in self.outputs.values()]

    @property
    def inputs(self) -> list[str]:
        """Keys of the pictures the job starts from."""
        return list(self.job.input.get("pictures", {}).values())

    @property
    def queued(self) -> float | None:
        """Seconds that it waited for a worker; ``None`` if it was with another one before."""
        if self.lease.attempt > 1 or self.job.started_at is None:
            return None
        return (self.job.started_at - self.job.created_at).total_seconds()

    def moved(self, event: Progress) -> None:
        """Note how far it is."""
        sigma = {} if event.sigma is None else {"sigma": round(event.sigma, 4)}
        self.progress = {"step": event.step, "total": event.total, **sigma}

    def looked(self, event: Preview) -> None:
        """Note what one of its images is becoming."""
        self._previews = {**self._previews, event.index: event}  # another thread may be reading the old one
        self._fresh = True

    def news(self) -> tuple[dict[str, Any], str | None]:
        """Return how far it is, and its previews where there are new ones and the last are a while ago."""
        now, previews = time.monotonic(), None
        if self._fresh and now >= self._shown_at + PREVIEW_SECONDS:
            self._fresh, self._shown_at = False, now
            previews = encode_previews([thumbnail(preview) for _, preview in sorted(self._previews.items())])
            self._shown += 1
        count = {PREVIEW_COUNT: self._shown} if self._shown else {}
        return self.progress | count, previews
