"""Advance many SDXL pictures together, one denoising step at a time.

Knows requests, latents, noise levels and LoRA sets. Knows nothing of HTTP, users, jobs or files of the service.

    engine = Engine.load("builtin")
    for event in engine.generate(GenerationRequest(prompt="a red fox on a blue background")):
        ...

One engine belongs to one thread. ``submit`` queues; every ``step`` moves one batch by one step and returns what
happened, so the caller owns progress, cancellation and the mixing of requests.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image

from impasto.engine.accel import choose_device, choose_dtype
from impasto.engine.batch import InFlight, Row, combine, network_call
from impasto.engine.conditioning import Embedding, PromptCache, condition
from impasto.engine.latents import latent_shape, noise, seeded
from impasto.engine.samplers import SAMPLERS
from impasto.engine.samplers.moment import denoise, scale_input
from impasto.engine.scheduler import Scheduler
from impasto.engine.sigmas import NoiseSchedule
from impasto.lora.apply import Adapters
from impasto.models.catalog import find_model
from impasto.models.sdxl import Sdxl
from impasto.types import LIMITS, Event, Failed, Finished, GenerationRequest, ImageReady, Progress, seed_of_image

DEFAULT_MAX_BATCH = 4  # images sharing one network call


class Engine:
    """Runs requests that may start and finish at different steps.

    Args:
        model: The networks.
        max_batch: Most images that share one UNet call.
    """

    def __init__(self, model: Sdxl, max_batch: int = DEFAULT_MAX_BATCH) -> None:
        self._model = model
        self._schedule = NoiseSchedule.from_config(model.scheduler_config)
        self._adapters = Adapters(model.networks())
        self._prompts = PromptCache(lambda prompt: Embedding(*model.encode(prompt)))
        self._scheduler = Scheduler(max_batch)
        self._pending: dict[str, GenerationRequest] = {}
        self._running: dict[str, InFlight] = {}
        self._rows: dict[int, Row] = {}
        self._row_ids = itertools.count()
        self._undelivered: list[Event] = []  # of other requests, seen while ``generate`` ran one

    @classmethod
    def load(
        cls, model: str = "builtin", *, device: str = "auto", dtype: str = "auto", max_batch: int = DEFAULT_MAX_BATCH
    ) -> Engine:
        """Load a model by name (``builtin``) or from a diffusers folder.

        Raises:
            ModelError: Not an SDXL model, or it cannot be read.
            ConfigError: No such device or dtype here.
        """
        source = find_model(model)
        at = choose_device(device)
        return cls(Sdxl.load(source, at, choose_dtype(dtype, at)), max_batch)

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._pending or self._running or self._undelivered)

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> str:
        """Queue a request and return its id; a seed of -1 is drawn when it starts."""
        request_id = request_id or secrets.token_hex(16)
        if request_id in self._pending or request_id in self._running:
            raise ValueError(f"request {request_id} is already here")
        self._pending[request_id] = request
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Drop a request before the next step; return whether it was here."""
        if self._pending.pop(request_id, None) is not None:
            return True
        return self._forget(request_id)

    def generate(self, request: GenerationRequest) -> Iterator[Event]:
        """Run one request to its end, yielding its events; closing the iterator cancels it.

        Other requests in the engine move along; their events wait for whoever calls ``step`` or ``generate`` next.

        Raises:
            ImpastoError: The request failed.
        """
        request_id = self.submit(request)
        try:
            while self._has(request_id):
                mine, others = _apart(self.step(), request_id)
                self._undelivered += others
                for event in mine:
                    if isinstance(event, Failed):
                        raise event.error
                    yield event
        finally:
            self.cancel(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit what is queued, move one batch by one step, and deliver what is done."""
        events, self._undelivered = self._undelivered, []
        for request_id in list(self._pending):
            events += self._admit(request_id, self._pending.pop(request_id))
        moving = self._scheduler.next_rows()
        if moving:
            events += self._move(moving)
        return events

    def _has(self, request_id: str) -> bool:
        waiting = any(event.request_id == request_id for event in self._undelivered)
        return waiting or request_id in self._pending or request_id in self._running

    def _admit(self, request_id: str, request: GenerationRequest) -> list[Event]:
        """Encode the prompt and draw the noise of each image; a request that cannot start fails alone."""
        try:
            flight = self._start(request_id, request)
        except Exception as error:  # noqa: BLE001  (whatever went wrong, the others go on)
            return [Failed(request_id, error)]
        self._running[request_id] = flight
        for row_id, row in flight.rows.items():
            self._rows[row_id] = row
            bucket = (tuple(row.latents.shape), len(row.conditioning.positive.tokens), flight.loras)
            self._scheduler.add(row_id, bucket, row.remaining)
        return []

    def _start(self, request_id: str, request: GenerationRequest) -> InFlight:
        if request.seed == -1:
            request = replace(request, seed=secrets.randbelow(int(LIMITS.seed.high) + 1))
        sampler = SAMPLERS[request.scheduler]
        path = sampler.plan(self._schedule, request.num_inference_steps)
        loras = self._adapters.resolve(request.loras)
        with self._adapters.active(loras):
            conditioning = condition(
                self._prompts,
                request.prompt,
                request.negative_prompt,
                guidance=request.guidance_scale > 1,
                zero_absent_negative=self._model.zero_absent_negative,
                width=request.width,
                height=request.height,
                weights=loras,
            )
        flight = InFlight(request, loras, started=time.perf_counter())
        for index in range(request.num_images):
            seed = seed_of_image(request.seed, index)
            generator = seeded(seed)
            start = noise(latent_shape(request.width, request.height), generator) * path.initial_scale
            flight.rows[next(self._row_ids)] = Row(
                request_id=request_id,
                index=index,
                seed=seed,
                latents=start.to(self._model.device),
                trajectory=path,
                sampler=sampler,
                conditioning=conditioning,
                guidance_scale=request.guidance_scale,
                guidance_rescale=request.guidance_rescale,
                generator=generator,
            )
        return flight

    def _move(self, row_ids: list[int]) -> list[Event]:
        """Take one denoising step with these rows. If the call fails, each is tried alone and fails alone."""
        rows = [self._rows[row_id] for row_id in row_ids]
        start = time.perf_counter()
        error = self._tried(rows)
        if error is not None:
            if len(row_ids) == 1:
                self._forget(rows[0].request_id)
                return [Failed(rows[0].request_id, error)]
            return [event for row_id in row_ids if row_id in self._rows for event in self._move([row_id])]
        seconds = time.perf_counter() - start
        events: list[Event] = []
        for request_id in dict.fromkeys(row.request_id for row in rows):
            flight = self._running[request_id]
            total = flight.request.num_inference_steps
            events.append(Progress(request_id, flight.steps_done(), total, seconds))
        for row in rows:
            if row.remaining == 0 and row.request_id in self._running:
                events += self._deliver(row)
        return events

    def _tried(self, rows: list[Row]) -> Exception | None:
        """Denoise, and return what went wrong, without the traceback that would keep the failed call's memory."""
        try:
            self._denoise(rows)
        except Exception as error:  # noqa: BLE001  (one bad row must not take the batch with it)
            return error.with_traceback(None)
        return None

    def _denoise(self, rows: list[Row]) -> None:
        """One UNet call over the rows, each at its own noise level; then each row's sampler moves it on."""
        device = self._model.device
        call = network_call(rows)
        x = torch.stack([rows[i].latents for i in call.order])
        sigma = torch.tensor([rows[i].sigma for i in call.order], device=device)
        timesteps = torch.stack([rows[i].timestep for i in call.order]).to(device)
        with self._adapters.active(self._running[rows[0].request_id].loras):
            output = self._model.predict(scale_input(x, sigma), timesteps, call.tokens, call.pooled, call.time_ids)
        ordered, prediction = combine(call, rows, output)
        first = call.guided  # the negative half is spent
        clean = denoise(x[first:], prediction, sigma[first:], self._schedule.prediction_type)
        moves = [row.moved(denoised) for row, denoised in zip(ordered, clean, strict=True)]
        for row, (latents, memory) in zip(ordered, moves, strict=True):  # all or none: a failed call is tried again
            row.latents, row.memory = latents, memory
            row.calls += 1

    def _deliver(self, row: Row) -> list[Event]:
        """Decode a row that reached noise level 0."""
        flight = self._running[row.request_id]
        try:
            picture = Image.fromarray(self._model.decode(row.latents).numpy())
        except Exception as error:  # noqa: BLE001  (the other requests go on)
            self._forget(row.request_id)
            return [Failed(row.request_id, error)]
        events: list[Event] = [ImageReady(row.request_id, row.index, row.seed, picture)]
        flight.delivered += 1
        if flight.delivered == flight.request.num_images:
            self._forget(row.request_id)
            events.append(Finished(row.request_id, time.perf_counter() - flight.started))
        return events

    def _forget(self, request_id: str) -> bool:
        flight = self._running.pop(request_id, None)
        if flight is None:
            return False
        self._scheduler.discard(flight.rows)
        for row_id in flight.rows:
            self._rows.pop(row_id, None)
        return True


def _apart(events: list[Event], request_id: str) -> tuple[list[Event], list[Event]]:
    """Divide events into those of one request and the rest."""
    mine = [event for event in events if event.request_id == request_id]
    return mine, [event for event in events if event.request_id != request_id]
