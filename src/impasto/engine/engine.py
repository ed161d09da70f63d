"""Advance many SDXL pictures together, one denoising step at a time.

Knows requests, latents, noise levels and LoRA sets. Knows nothing of HTTP, users, jobs or files of the service.

    engine = Engine.load("builtin")
    for event in engine.generate(GenerationRequest(prompt="a red fox on a blue background")):
        ...

One engine belongs to one thread, but for ``preload``. ``submit`` queues; every ``step`` moves one batch by one step and
returns what happened, so the caller owns progress, previews, cancellation and the mixing of requests.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from PIL import Image

from impasto.engine.accel import Accel, accelerate_model, decodes_beside, in_tiles
from impasto.engine.admission import Admission
from impasto.engine.batch import InFlight, Row, combine, features_of, keep_features, network_call
from impasto.engine.costs import Costs
from impasto.engine.decoding import Decoded, Decoding
from impasto.engine.legs import Stage
from impasto.engine.memory import BatchLimits, MemoryGauge, allocated, free_memory
from impasto.engine.outcome import apart, failed
from impasto.engine.placement import choose_devices, choose_dtypes
from impasto.engine.samplers.moment import denoise, scale_input
from impasto.engine.scheduler import Scheduler
from impasto.engine.sigmas import NoiseSchedule
from impasto.errors import ConfigError
from impasto.lora.apply import Adapters, LoraSet
from impasto.lora.budgets import Budgets
from impasto.models.catalog import find_model
from impasto.models.denoiser import Denoiser
from impasto.models.hub import fetch_model
from impasto.models.sdxl import Sdxl
from impasto.types import Event, Failed, Finished, GenerationRequest, ImageReady, Preview, Progress

log = logging.getLogger(__name__)

DEFAULT_MAX_BATCH = 4  # images sharing one network call
HALVES = 2  # network rows of a guided image
PATCHED: dict[Stage, str] = {"base": "unet", "refiner": "refiner"}  # the network, by its name for LoRAs


class Engine:
    """Runs requests that may start and finish at different steps.

    Args:
        model: The networks.
        max_batch: Most images that share one UNet call; fewer where memory, as measured, has no room for them.
        lora_memory_bytes: Main memory for LoRA files that were read lately; by default a share of what is free.
        lora_switch_bytes: Memory beside the weights for LoRAs that were on lately; by default a share of what is free.
        decode_beside: Decode on a thread of its own while others step.
    """

    def __init__(
        self,
        model: Sdxl,
        max_batch: int = DEFAULT_MAX_BATCH,
        *,
        lora_memory_bytes: int | None = None,
        lora_switch_bytes: int | None = None,
        decode_beside: bool = False,
    ) -> None:
        self._model = model
        self._stages: dict[Stage, Denoiser] = {"base": model.base}
        if model.refiner is not None:
            self._stages["refiner"] = model.refiner
        self._schedules = {
            stage: NoiseSchedule.from_config(denoiser.scheduler_config) for stage, denoiser in self._stages.items()
        }
        self._gauge = MemoryGauge(model.device)
        budgets = Budgets.within(free_memory(), self._gauge.free(), lora_memory_bytes, lora_switch_bytes)
        self._adapters = Adapters(model.networks(), budgets)
        self._admission = Admission(model, self._adapters, self._schedules)
        self._limits = BatchLimits(self._gauge, HALVES * max_batch)  # a guided image is two rows of the network
        self._scheduler = Scheduler(max_batch)
        self._costs = Costs()
        self._decoding = Decoding(model.vae, model.devices.vae, beside=decode_beside)
        self._pending: dict[str, tuple[GenerationRequest, int]] = {}  # with the steps between previews
        self._running: dict[str, InFlight] = {}
        self._rows: dict[int, Row] = {}
        self._undelivered: list[Event] = []  # of other requests, seen while ``generate`` ran one

    @classmethod
    def load(
        cls,
        model: str = "builtin",
        *,
        refiner: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = DEFAULT_MAX_BATCH,
        accel: Accel | None = None,
        lora_memory_bytes: int | None = None,
        lora_switch_bytes: int | None = None,
    ) -> Engine:
        """Load a model by name (``builtin``), from a diffusers folder, a single-file checkpoint or a hub id.

        Args:
            model: A base or inpainting model.
            refiner: A refiner for requests that ask for one; it shares the base's second text encoder and VAE.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; ``cuda,text=cpu`` puts a part elsewhere.
            dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; ``bfloat16,vae=float32`` excepts a part.
            max_batch: Most images that share one UNet call.
            accel: What makes it faster or smaller; nothing by default.
            lora_memory_bytes: As the class's; ``lora_switch_bytes`` likewise.

        Raises:
            ModelError: Not an SDXL model, or it cannot be read.
            ConfigError: No such device or dtype here.
        """
        if max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, got {max_batch}")
        devices = choose_devices(device)
        dtypes = choose_dtypes(dtype, devices)
        accel = accel or Accel()
        fetch = partial(fetch_model, full=dtypes.unet == torch.float32)
        loaded = Sdxl.load(
            find_model(model, fetch),
            devices,
            dtypes,
            refiner=None if refiner is None else find_model(refiner, fetch),
            offload=accel.offload,
            tiles=partial(in_tiles, accel.vae_tiling, MemoryGauge(devices.vae)),
        )
        accelerate_model(loaded, accel)
        budgets = {"lora_memory_bytes": lora_memory_bytes, "lora_switch_bytes": lora_switch_bytes}
        return cls(loaded, max_batch, **budgets, decode_beside=decodes_beside(accel))

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._pending or self._running or self._undelivered)

    @property
    def device(self) -> str:
        """Where the UNet runs, such as ``cuda:0``."""
        return str(self._model.device)

    def usage(self) -> dict[str, float]:
        """Return what it holds now and has done since it was loaded, for whoever watches it.

        ``lora_switches`` (changes of a network's weights) and their ``lora_switch_seconds``; ``lora_cache_hits`` and
        ``lora_cache_misses`` (sets that were in memory when a switch wanted them, or not); ``lora_bytes`` (memory that
        makes switches fast); where the device can tell, ``device_bytes`` and the allocator's ``device_reserved_bytes``.
        """
        adapters = self._adapters
        held = {"lora_bytes": float(sum(adapters.held_bytes.values()))}
        return adapters.counts.to_json() | held | allocated(self._model.device)

    def preload(self, request: GenerationRequest, stop: Callable[[], bool] = lambda: False) -> None:
        """Read the LoRA files of a request to come and make them ready: its start then holds up nobody for that.

        The one method that another thread may call, while this one steps; beside steps it takes about five times as
        long as alone. ``stop`` says when nobody wants it any more.

        Raises:
            LoraError: A file cannot be used, as the request would find; or nobody wants it any more.
        """
        self._adapters.preload(request.loras, lambda: self.busy, stop)

    def submit(self, request: GenerationRequest, request_id: str | None = None, *, preview_every: int = 0) -> str:
        """Queue a request and return its id; a seed of -1 is drawn when it starts.

        ``preview_every`` asks for a rough picture of each image after every so many of its steps.
        """
        request_id = request_id or secrets.token_hex(16)
        if request_id in self._pending or request_id in self._running:
            raise ValueError(f"request {request_id} is already here")
        if preview_every < 0:
            raise ValueError("preview_every must be 0 (none) or more")
        self._pending[request_id] = (request, preview_every)
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Drop a request and its undelivered events; return whether it was here."""
        _, self._undelivered = apart(self._undelivered, request_id)
        if self._pending.pop(request_id, None) is not None:
            return True
        return self._forget(request_id)

    def generate(self, request: GenerationRequest, *, preview_every: int = 0) -> Iterator[Event]:
        """Run one request to its end, yielding its events; closing the iterator cancels it.

        Other requests in the engine move along; their events wait for whoever calls ``step`` or ``generate`` next.

        Raises:
            ImpastoError: The request failed for a reason that a user can mend; any other exception is a fault here.
        """
        request_id = self.submit(request, preview_every=preview_every)
        try:
            while self._has(request_id):
                mine, others = apart(self.step(), request_id)
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
            events += self._admit(request_id, *self._pending.pop(request_id))
        self._scheduler.patience = self._costs.patience(len({self._part(row) for row in self._rows.values()}))
        moving = self._scheduler.next_rows(self._share)
        if moving:
            events += self._move(moving)
        decoded = self._decoding.done(patiently=not moving)
        return events + [event for one in decoded for event in self._deliver(one)]

    def _has(self, request_id: str) -> bool:
        waiting = any(event.request_id == request_id for event in self._undelivered)
        return waiting or request_id in self._pending or request_id in self._running

    def _admit(self, request_id: str, request: GenerationRequest, preview_every: int) -> list[Event]:
        """Start a request; one that cannot start fails alone."""
        start = time.perf_counter()
        try:
            flight = self._admission.admit(request_id, request, preview_every)
        except Exception as error:  # noqa: BLE001  (whatever went wrong, the others go on)
            return [failed(request_id, error)]
        flight.took("encode", time.perf_counter() - start)
        self._running[request_id] = flight
        self._rows |= flight.rows
        for row_id, row in flight.rows.items():
            self._scheduler.add(row_id, self._bucket(row), row.remaining, weight=row.latents[0].numel())
        return []

    def _bucket(self, row: Row) -> Hashable:
        """What must agree for rows to share a network call; LoRAs that do nothing to the network need not."""
        depth = (row.shallow, row.pace.reuses)
        return row.leg.stage, tuple(row.latents.shape), depth, len(row.steers.positive.tokens), self._part(row)

    def _part(self, row: Row) -> LoraSet:
        """The LoRAs that change the network of a row's next call."""
        return self._adapters.touching(self._running[row.request_id].loras, PATCHED[row.leg.stage])

    def _size(self, row: Row) -> Hashable:
        """What the memory and the time of a row's next call depend on."""
        return row.leg.stage, tuple(row.latents.shape), row.shallow

    def _share(self, row_id: int, ready: int) -> int:
        """How many of the images that are ready should share the next call, by what calls were measured to take."""
        return self._costs.share(self._size(self._rows[row_id]), ready)

    def _move(self, row_ids: list[int]) -> list[Event]:
        """Take one denoising step with these rows, in as many network calls as memory asks for."""
        events: list[Event] = []
        start = time.perf_counter()
        waiting = row_ids
        while waiting:
            room = max(1, self._limits.limit(self._size(self._rows[waiting[0]])) // HALVES)
            events += self._call(waiting[:room])
            waiting = [row_id for row_id in waiting[room:] if row_id in self._rows]  # a failure ends a whole request
        seconds = time.perf_counter() - start
        moved = {row_id: self._rows[row_id] for row_id in row_ids if row_id in self._rows}
        for request_id in dict.fromkeys(row.request_id for row in moved.values()):
            flight = self._running[request_id]
            flight.took("denoise", seconds)
            sigma = max(row.sigma for row in flight.rows.values())
            events.append(Progress(request_id, flight.steps_done(), flight.steps, seconds, sigma, len(moved)))
        for row_id, row in moved.items():
            if row.remaining:
                self._scheduler.move(row_id, self._bucket(row))
                events += self._preview(row)
            else:
                self._decoding.begin(row_id, row.latents)
        return events

    def _call(self, row_ids: list[int]) -> list[Event]:
        """Move rows in one network call; return the failures. If it fails, each row is tried alone and fails alone."""
        rows = [self._rows[row_id] for row_id in row_ids]
        error = self._tried(rows)
        if error is None:
            return []
        error.__traceback__ = None if len(rows) > 1 else error.__traceback__  # its frames hold the call's memory
        if isinstance(error, torch.OutOfMemoryError):
            self._limits.halve(self._size(rows[0]), HALVES * len(rows))
        if len(row_ids) == 1:
            self._forget(rows[0].request_id)
            return [failed(rows[0].request_id, error)]
        return [event for row_id in row_ids if row_id in self._rows for event in self._call([row_id])]

    def _tried(self, rows: list[Row]) -> Exception | None:
        """Denoise, and return what went wrong."""
        streams = [row.generator.get_state() for row in rows]
        try:
            self._denoise(rows)
        except Exception as error:  # noqa: BLE001  (one bad row must not take the batch with it)
            for row, stream in zip(rows, streams, strict=True):  # the next try draws the same noise
                row.generator.set_state(stream)
            return error
        return None

    def _denoise(self, rows: list[Row]) -> None:
        """One UNet call over the rows, each at its own noise level; then each row's sampler moves it on."""
        stage, call = rows[0].leg.stage, network_call(rows)
        denoiser, device = self._stages[stage], self._model.device
        x = torch.stack([rows[i].latents for i in call.order])
        sigma = torch.tensor([rows[i].sigma for i in call.order], device=device)
        timesteps = torch.stack([rows[i].timestep for i in call.order]).to(device)
        scaled = scale_input(x, sigma)
        if denoiser.inpaints:
            beside = [row.beside for i in call.order if (row := rows[i]).beside is not None]
            scaled = torch.cat([scaled, torch.stack(beside)], 1)
        inputs = (scaled, timesteps, call.tokens, call.pooled, call.time_ids)
        with self._patched(rows[0]) as switch, self._measured(rows[0], len(call.order)):
            start = time.perf_counter()
            if rows[0].shallow:
                output = denoiser.predict_shallow(*inputs, features_of(call, rows))
            elif rows[0].pace.reuses:
                output, features = denoiser.predict_keeping(*inputs)
                keep_features(call, rows, features)
            else:
                output = denoiser.predict(*inputs)
        ordered, prediction = combine(call, rows, output)  # waits for the device
        self._costs.learn(self._size(rows[0]), len(rows), time.perf_counter() - start, switch)
        first = call.guided  # the negative half is spent
        clean = denoise(x[first:], prediction, sigma[first:], self._schedules[stage].prediction_type)
        moves = [row.moved(denoised) for row, denoised in zip(ordered, clean, strict=True)]
        for row, denoised, move in zip(ordered, clean, moves, strict=True):  # all or none: a failed call is tried again
            row.denoised = denoised
            row.advance(move)

    @contextmanager
    def _patched(self, row: Row) -> Iterator[float | None]:
        """Have a row's LoRAs on the network of its next call; yields the seconds that took, if others were on."""
        before = self._adapters.last_switch
        with self._adapters.active(self._running[row.request_id].loras, PATCHED[row.leg.stage]):
            switch = self._adapters.last_switch
            yield None if switch is None or switch is before else switch.seconds

    @contextmanager
    def _measured(self, row: Row, network_rows: int) -> Iterator[None]:
        """Learn what memory a network call takes."""
        with self._gauge.measure() as peak:
            yield
        if not self._decoding.beside:  # whose memory would count as the call's
            self._limits.learn(self._size(row), network_rows, peak.bytes)

    def _preview(self, row: Row) -> list[Event]:
        """Show roughly what a row is becoming, where its request asked for it."""
        flight = self._running[row.request_id]
        step = row.steps_done(flight.steps)
        if not flight.preview_every or row.denoised is None or step % flight.preview_every or not row.began_step:
            return []
        try:
            picture = Image.fromarray(self._model.vae.preview(row.denoised).numpy())
        except Exception:  # a preview that fails costs nobody the picture
            log.exception("request %s: no preview", row.request_id)
            return []
        return [Preview(row.request_id, row.index, step, picture)]

    def _deliver(self, decoded: Decoded) -> list[Event]:
        """Hand over a decoded picture, and put back what it was to keep."""
        row = self._rows.get(decoded.row_id)
        if row is None:  # dropped meanwhile
            return []
        flight = self._running[row.request_id]
        try:
            pixels = decoded.pixels()
            picture = Image.fromarray(pixels if flight.start is None else flight.start.finish(pixels))
        except Exception as error:  # noqa: BLE001  (the other requests go on)
            self._forget(row.request_id)
            return [failed(row.request_id, error)]
        flight.took("decode", decoded.seconds)
        events: list[Event] = [ImageReady(row.request_id, row.index, row.seed, picture)]
        flight.delivered += 1
        if flight.delivered == flight.request.num_images:
            self._forget(row.request_id)
            seconds = time.perf_counter() - flight.started
            events.append(Finished(row.request_id, seconds, flight.reports, flight.stages))
        return events

    def _forget(self, request_id: str) -> bool:
        flight = self._running.pop(request_id, None)
        if flight is None:
            return False
        self._scheduler.discard(flight.rows)
        for row_id in flight.rows:
            self._rows.pop(row_id, None)
        return True
