"""Makes start pictures move, one network call or one decoded frame at a time.

Knows requests for videos, an engine's networks and a motion adapter. Knows no jobs, settings, HTTP or video files.

    animator = Animator(Engine.load("builtin"))
    for event in animator.animate(GenerationRequest(prompt="a frog", image=picture, animation=Animation(16, 8))):
        ...

It shares the engine's networks and thread, so the two take turns (``turns``). Experimental: motion adapters for SDXL
are small or unfinished, and a start picture is more than AnimateDiff was made for.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image

from impasto.animate.clip import Clip, clip_noise
from impasto.animate.motions import moved
from impasto.animate.network import VideoNetwork
from impasto.engine.engine import Engine
from impasto.engine.latents import seeded
from impasto.engine.legs import plan_legs
from impasto.engine.outcome import failed
from impasto.engine.parts import parts_of
from impasto.engine.pictures import Start
from impasto.engine.samplers import SAMPLERS
from impasto.engine.samplers.moment import denoise, guided, rescaled, scale_input
from impasto.errors import InvalidInput
from impasto.models.catalog import BUILTIN
from impasto.types import LIMITS, Event, Failed, Finished, GenerationRequest, Preview, Progress, VideoReady

log = logging.getLogger(__name__)


class Animator:
    """Runs requests for videos, one after another.

    Args:
        engine: Whose networks it uses; its steps and the engine's belong to one thread.
        adapter: The motion adapter: ``builtin``, a folder, or ``owner/name`` of the hub; ``None``: there is none.

    Raises:
        ModelError: There is no such adapter, or it does not fit the engine's model.
    """

    def __init__(self, engine: Engine, adapter: str | None = "builtin") -> None:
        self._parts = parts_of(engine)
        self._network = VideoNetwork(self._parts.model.base, adapter)
        self._usual = "bounce" if adapter == BUILTIN else "none"  # what ``auto`` is
        self._pending: OrderedDict[str, tuple[GenerationRequest, int]] = OrderedDict()
        self._clip: Clip | None = None

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._pending or self._clip)

    def submit(self, request: GenerationRequest, request_id: str | None = None, *, preview_every: int = 0) -> str:
        """Queue a request and return its id; a seed of -1 is drawn when it starts."""
        request_id = request_id or secrets.token_hex(16)
        if request_id in self._pending or self._runs(request_id):
            raise ValueError(f"request {request_id} is already here")
        self._pending[request_id] = (request, preview_every)
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Drop a request before the next step; return whether it was here."""
        if self._runs(request_id):
            self._clip = None
            return True
        return self._pending.pop(request_id, None) is not None

    def animate(self, request: GenerationRequest, *, preview_every: int = 0) -> Iterator[Event]:
        """Run one request to its end, yielding its events; closing the iterator cancels it.

        Raises:
            ImpastoError: The request failed for a reason that a user can mend; any other exception is a fault here.
        """
        request_id = self.submit(request, preview_every=preview_every)
        try:
            while self.busy:
                for event in self.step():
                    if isinstance(event, Failed) and event.request_id == request_id:
                        raise event.error
                    if event.request_id == request_id:
                        yield event
        finally:
            self.cancel(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Begin the next video, or take one network call or decode one frame of the one that runs."""
        if self._clip is None and not self._pending:
            return []
        request_id = next(iter(self._pending)) if self._clip is None else self._clip.request_id
        try:
            return self._step()
        except Exception as error:  # noqa: BLE001  (the next video goes on)
            self.cancel(request_id)
            return [failed(request_id, error)]

    def _runs(self, request_id: str) -> bool:
        return self._clip is not None and self._clip.request_id == request_id

    def _step(self) -> list[Event]:
        if self._clip is None:
            request_id, (request, preview_every) = next(iter(self._pending.items()))
            self._clip = self._begun(request_id, request, preview_every)
            del self._pending[request_id]
            return []
        return self._denoise(self._clip) if self._clip.remaining else self._decode(self._clip)

    def _begun(self, request_id: str, request: GenerationRequest, preview_every: int) -> Clip:
        """Read the prompt, plan the way and noise the start picture."""
        animation = request.animation
        if animation is None or request.image is None:
            raise InvalidInput("image", "is missing: a video begins with a picture")
        if animation.frames > self._network.longest:
            raise InvalidInput("frames", f"must be at most {self._network.longest} with this motion adapter")
        if request.seed == -1:
            request = replace(request, seed=secrets.randbelow(int(LIMITS.seed.high) + 1))
        start = time.perf_counter()
        still = replace(request, image=None, animation=None)  # its conditioning is a picture's
        flight = self._parts.admission.admit(request_id, still, preview_every)
        [row] = flight.rows.values()
        [leg] = plan_legs(request, SAMPLERS[request.scheduler], {"base": self._network.schedule})
        generator = seeded(request.seed)
        motion = self._usual if animation.motion == "auto" else animation.motion
        starts = moved(self._encoded(request), motion, animation.frames, animation.fps)
        drawn = clip_noise(tuple(starts.shape[1:]), animation.frames, generator).to(starts.device)
        flight.request = request
        flight.took("encode", time.perf_counter() - start)
        return Clip(request_id, flight, row.sampler, row.conditioning["base"], generator, leg, starts, drawn)

    def _encoded(self, request: GenerationRequest) -> torch.Tensor:
        """The start picture's latents, at the asked size."""
        start = Start.of(request)
        assert start is not None
        pixels = torch.from_numpy(start.pixels.copy()).permute(2, 0, 1) / 127.5 - 1
        mean, _ = self._parts.model.vae.encode(pixels)
        return mean.float().to(self._parts.model.device)

    def _denoise(self, clip: Clip) -> list[Event]:
        """One sampler step of all frames; guidance asks for two network calls, one after the other."""
        start, request = time.perf_counter(), clip.flight.request
        with self._parts.adapters.active(clip.flight.loras, "unet"):
            prediction = self._predicted(clip)
        sigma = torch.full((len(clip.latents),), clip.sigma, device=clip.latents.device)
        clip.advance(denoise(clip.latents, prediction, sigma, self._network.schedule.prediction_type))
        seconds = time.perf_counter() - start
        clip.flight.took("denoise", seconds)
        done, total = clip.steps_done, clip.leg.steps
        events: list[Event] = [Progress(clip.request_id, done, total, seconds, clip.sigma, len(clip.latents))]
        every = clip.flight.preview_every
        if every and clip.remaining and done % every == 0 and clip.denoised is not None:
            middle = clip.denoised[len(clip.denoised) // 2]
            picture = Image.fromarray(self._parts.model.vae.preview(middle).numpy())
            events.append(Preview(clip.request_id, 0, done, picture))
        log.debug("request %s: step %d of %d, guidance %g", clip.request_id, done, total, request.guidance_scale)
        return events

    def _predicted(self, clip: Clip) -> torch.Tensor:
        steers, request, frames = clip.conditioning, clip.flight.request, len(clip.latents)
        x = scale_input(clip.latents, torch.full((frames,), clip.sigma, device=clip.latents.device))
        wanted = self._network.predict(x, clip.timestep, steers.positive, steers.time_ids)
        if not clip.guided or steers.negative is None:
            return wanted
        unwanted = self._network.predict(x, clip.timestep, steers.negative, steers.negative_time_ids)
        prediction = guided(wanted, unwanted, wanted.new_full((frames,), request.guidance_scale))
        if request.guidance_rescale:
            prediction = rescaled(prediction, wanted, wanted.new_full((frames,), request.guidance_rescale))
        return prediction

    def _decode(self, clip: Clip) -> list[Event]:
        """Decode one more frame; with the last one the video is done."""
        start, flight = time.perf_counter(), clip.flight
        pixels = self._parts.model.vae.decode(clip.latents[len(clip.pictures)]).numpy()
        clip.pictures.append(Image.fromarray(pixels))
        flight.took("decode", time.perf_counter() - start)
        if len(clip.pictures) < len(clip.latents):
            return []
        self._clip = None
        assert flight.request.animation is not None
        seconds = time.perf_counter() - flight.started
        return [
            VideoReady(clip.request_id, flight.request.seed, flight.request.animation.fps, tuple(clip.pictures)),
            Finished(clip.request_id, seconds, flight.reports, flight.stages),
        ]
