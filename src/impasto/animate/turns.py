"""Pictures and videos from one set of networks: the engine and the animator take turns.

Knows both, and that neither may starve the other. Knows no jobs. It fits the worker's ``Backend``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from impasto.animate.animator import Animator
from impasto.engine.engine import Engine
from impasto.errors import ImpastoError, ModelError
from impasto.types import Event, Failed, GenerationRequest


class TakingTurns:
    """One backend for pictures and videos.

    While there are both, each ``step`` is one of the engine's (a denoising step of a batch of pictures) and one of the
    animator's (a step of one video, or one decoded frame): between two steps of its own a picture waits for one step of
    a video at most, and videos wait for each other.

    Args:
        engine: Draws pictures.
        animator: Makes the animator, when the first video is asked for: until then its adapter takes no memory.
    """

    def __init__(self, engine: Engine, animator: Callable[[], Animator]) -> None:
        self._engine = engine
        self._make = animator
        self._animator: Animator | None = None
        self._unable: list[Event] = []  # videos that there is no adapter for

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._engine.busy or self._unable or (self._animator and self._animator.busy))

    @property
    def device(self) -> str:
        """Where the UNet runs."""
        return self._engine.device

    def usage(self) -> Mapping[str, float]:
        """Return what the engine holds and has done."""
        return self._engine.usage()

    def preload(self, request: GenerationRequest, stop: Callable[[], bool] = lambda: False) -> None:
        """Make a request's LoRAs ready, of pictures and videos alike: they share the networks."""
        self._engine.preload(request, stop)

    def submit(self, request: GenerationRequest, request_id: str | None = None, *, preview_every: int = 0) -> str:
        """Take a request in."""
        if request.animation is None:
            return self._engine.submit(request, request_id, preview_every=preview_every)
        try:
            self._animator = self._animator or self._make()
        except ImpastoError as error:
            request_id = request_id or "video"
            self._unable.append(Failed(request_id, ModelError(f"this server makes no videos: {error}")))
            return request_id
        return self._animator.submit(request, request_id, preview_every=preview_every)

    def cancel(self, request_id: str) -> bool:
        """Drop a request before the next step; return whether it was here."""
        here = self._engine.cancel(request_id)
        return (self._animator is not None and self._animator.cancel(request_id)) or here

    def step(self) -> list[Event]:
        """Move a batch of pictures by one step, and a video by one, as far as there are any."""
        events, self._unable = self._unable, []
        if self._engine.busy:
            events += self._engine.step()
        if self._animator is not None and self._animator.busy:
            events += self._animator.step()
        return events
