"""What the worker asks of an engine, and a stand-in that needs no model.

Knows requests and events. Knows no torch: ``Engine`` fits ``Backend`` without being imported here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from PIL import Image, ImageChops, ImageOps

from impasto.types import (
    Animation,
    Event,
    Finished,
    GenerationRequest,
    ImageReady,
    Preview,
    Progress,
    VideoReady,
    seed_of_image,
)

FAKE_STEP_SECONDS = 0.02
FAKE_SIGMA = 14.6  # noise level that the steps come down from
CELL = 8  # pixels of a side that one of a preview stands for


class Backend(Protocol):
    """Moves requests, one step at a time."""

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""

    @property
    def device(self) -> str:
        """Where it runs, such as ``cuda:0``."""

    def preload(self, request: GenerationRequest, stop: Callable[[], bool]) -> None:
        """Make the files of a request to come ready, until ``stop``; unlike all else here, from other threads."""

    def submit(self, request: GenerationRequest, request_id: str | None = None, *, preview_every: int = 0) -> str:
        """Take a request in; it moves from the next ``step`` on, and shows itself every so many steps (0: never)."""

    def step(self) -> list[Event]:
        """Move some images by one step and return what happened."""

    def cancel(self, request_id: str) -> bool:
        """Drop a request before the next step; return whether it was here."""

    def usage(self) -> Mapping[str, float]:
        """Return what it holds now and has done so far, by name; the names stand at ``Engine.usage``."""


class FakeBackend:
    """Draws test patterns that depend on prompt, seed and start picture: real shapes and timings, no network.

    Args:
        step_seconds: How long one step takes.
    """

    def __init__(self, step_seconds: float = FAKE_STEP_SECONDS) -> None:
        self._step_seconds = step_seconds
        self._requests: dict[str, tuple[GenerationRequest, int]] = {}  # with steps done
        self._preview_every: dict[str, int] = {}

    @property
    def device(self) -> str:
        """Nowhere."""
        return "none"

    def usage(self) -> Mapping[str, float]:
        """Nothing is held and no LoRA switched."""
        return {}

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def preload(self, request: GenerationRequest, stop: Callable[[], bool]) -> None:
        """Nothing is read."""

    def submit(self, request: GenerationRequest, request_id: str | None = None, *, preview_every: int = 0) -> str:
        """Take a request in."""
        request_id = request_id or secrets.token_hex(16)
        self._requests[request_id] = (request, 0)
        self._preview_every[request_id] = preview_every
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Drop a request."""
        self._preview_every.pop(request_id, None)
        return self._requests.pop(request_id, None) is not None

    def step(self) -> list[Event]:
        """Move every request by one step."""
        time.sleep(self._step_seconds)
        events: list[Event] = []
        batch = sum(request.num_images for request, _ in self._requests.values())
        for request_id, (request, done) in list(self._requests.items()):
            done += 1
            self._requests[request_id] = (request, done)
            total = request.num_inference_steps
            sigma = FAKE_SIGMA * (1 - done / total)
            events.append(Progress(request_id, done, total, self._step_seconds, sigma, batch))
            if done == total:
                self.cancel(request_id)
                events += self._pictures(request_id, request)
            elif (every := self._preview_every.get(request_id)) and done % every == 0:
                events += self._previews(request_id, request, done)
        return events

    def _previews(self, request_id: str, request: GenerationRequest, done: int) -> list[Event]:
        """Show each picture small, out of a mist that clears."""
        size = (request.width // CELL, request.height // CELL)
        mist = Image.new("RGB", size, (128, 128, 128))
        share = done / request.num_inference_steps
        seeds = [seed_of_image(request.seed, i) for i in range(request.num_images)]
        return [
            Preview(request_id, i, done, Image.blend(mist, _gradient(request.prompt, seed, size), share))
            for i, seed in enumerate(seeds)
        ]

    def _pictures(self, request_id: str, request: GenerationRequest) -> list[Event]:
        pictures: list[Event] = [
            ImageReady(request_id, i, seed, draw_pattern(request, seed))
            for i, seed in enumerate(seed_of_image(request.seed, i) for i in range(request.num_images))
        ]
        if request.animation is not None:
            pictures = [draw_video(request_id, request, request.animation)]
        seconds = request.num_inference_steps * self._step_seconds
        return [*pictures, Finished(request_id, seconds, stages={"encode": 0.0, "denoise": seconds, "decode": 0.0})]


def draw_pattern(request: GenerationRequest, seed: int) -> Image.Image:
    """Return a two-colour gradient of the asked size whose colours come from the seed and the prompt.

    A start picture is mixed in by ``strength``, and kept bit for bit where the mask is black.
    """
    pattern = _gradient(request.prompt, seed, (request.width, request.height))
    return pattern if request.image is None else _drawn_over(request.image, pattern, request)


def draw_video(request_id: str, request: GenerationRequest, animation: Animation) -> VideoReady:
    """Return a video that begins with the start picture and fades into the pattern, by ``strength`` at the end."""
    pattern = _gradient(request.prompt, request.seed, (request.width, request.height))
    start = ImageOps.fit((request.image or pattern).convert("RGB"), pattern.size)
    shares = np.linspace(0, request.strength, animation.frames).tolist()
    frames = tuple(Image.blend(start, pattern, share) for share in shares)
    return VideoReady(request_id, request.seed, animation.fps, frames)


def _gradient(prompt: str, seed: int, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng([seed + 1, *prompt.encode()])
    corner, edge = rng.integers(0, 256, (2, 3))
    across = np.linspace(0, 1, size[0])[None, :, None]
    down = np.linspace(0, 1, size[1])[:, None, None]
    mixed = (across + down) / 2
    return Image.fromarray((corner * (1 - mixed) + edge * mixed).astype(np.uint8))


def _drawn_over(image: Image.Image, pattern: Image.Image, request: GenerationRequest) -> Image.Image:
    """Mix ``pattern`` into the start picture, everywhere or where the mask (or a transparent part) says so."""
    start = ImageOps.fit(image, pattern.size)
    mixed = Image.blend(start.convert("RGB"), pattern, request.strength)
    if request.mask_image is not None:
        return Image.composite(mixed, start.convert("RGB"), ImageOps.fit(request.mask_image.convert("L"), pattern.size))
    if start.mode == "RGBA":
        return Image.composite(mixed, start.convert("RGB"), ImageChops.invert(start.getchannel("A")))
    return mixed
