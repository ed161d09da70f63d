"""What the worker asks of an engine, and a stand-in that needs no model.

Knows requests and events. Knows no torch: ``Engine`` fits ``Backend`` without being imported here.
"""

from __future__ import annotations

import secrets
import time
from typing import Protocol

import numpy as np
from PIL import Image, ImageChops, ImageOps

from impasto.types import Event, Finished, GenerationRequest, ImageReady, Progress, seed_of_image

FAKE_STEP_SECONDS = 0.02


class Backend(Protocol):
    """Moves requests, one step at a time."""

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> str:
        """Take a request in; it moves from the next ``step`` on."""

    def step(self) -> list[Event]:
        """Move some images by one step and return what happened."""

    def cancel(self, request_id: str) -> bool:
        """Drop a request before the next step; return whether it was here."""


class FakeBackend:
    """Draws test patterns that depend on prompt, seed and start picture: real shapes and timings, no network.

    Args:
        step_seconds: How long one step takes.
    """

    def __init__(self, step_seconds: float = FAKE_STEP_SECONDS) -> None:
        self._step_seconds = step_seconds
        self._requests: dict[str, tuple[GenerationRequest, int]] = {}  # with steps done

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> str:
        """Take a request in."""
        request_id = request_id or secrets.token_hex(16)
        self._requests[request_id] = (request, 0)
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Drop a request."""
        return self._requests.pop(request_id, None) is not None

    def step(self) -> list[Event]:
        """Move every request by one step."""
        time.sleep(self._step_seconds)
        events: list[Event] = []
        for request_id, (request, done) in list(self._requests.items()):
            done += 1
            self._requests[request_id] = (request, done)
            events.append(Progress(request_id, done, request.num_inference_steps, self._step_seconds))
            if done == request.num_inference_steps:
                del self._requests[request_id]
                events += self._pictures(request_id, request)
        return events

    def _pictures(self, request_id: str, request: GenerationRequest) -> list[Event]:
        pictures: list[Event] = [
            ImageReady(request_id, i, seed, draw_pattern(request, seed))
            for i, seed in enumerate(seed_of_image(request.seed, i) for i in range(request.num_images))
        ]
        return [*pictures, Finished(request_id, request.num_inference_steps * self._step_seconds)]


def draw_pattern(request: GenerationRequest, seed: int) -> Image.Image:
    """Return a two-colour gradient of the asked size whose colours come from the seed and the prompt.

    A start picture is mixed in by ``strength``, and kept bit for bit where the mask is black.
    """
    rng = np.random.default_rng([seed + 1, *request.prompt.encode()])
    corner, edge = rng.integers(0, 256, (2, 3))
    across = np.linspace(0, 1, request.width)[None, :, None]
    down = np.linspace(0, 1, request.height)[:, None, None]
    mixed = (across + down) / 2
    pattern = Image.fromarray((corner * (1 - mixed) + edge * mixed).astype(np.uint8))
    return pattern if request.image is None else _drawn_over(request.image, pattern, request)


def _drawn_over(image: Image.Image, pattern: Image.Image, request: GenerationRequest) -> Image.Image:
    """Mix ``pattern`` into the start picture, everywhere or where the mask (or a transparent part) says so."""
    start = ImageOps.fit(image, pattern.size)
    mixed = Image.blend(start.convert("RGB"), pattern, request.strength)
    if request.mask_image is not None:
        return Image.composite(mixed, start.convert("RGB"), ImageOps.fit(request.mask_image.convert("L"), pattern.size))
    if start.mode == "RGBA":
        return Image.composite(mixed, start.convert("RGB"), ImageChops.invert(start.getchannel("A")))
    return mixed
