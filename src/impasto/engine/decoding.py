"""Turning finished latents into pictures: between the steps of other rows, or beside them on a thread of its own.

Knows latents, pixels, threads and CUDA's streams. Knows no rows, requests or networks: what decodes is handed in.

Beside pays where the VAE has a device of its own, or where others must not be held up: a large picture's decode takes
as long as several steps. It takes memory at the same time as the steps, and on one device it takes their time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from impasto.models.spread import give_threads

PATIENCE: Final = 0.05  # seconds that ``done`` waits for a picture: somebody new may want to begin


class Decoder(Protocol):
    """Makes pixels of latents; may be called from another thread."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode ``[4, h, w]`` to a picture ``[H, W, 3]``, uint8, on the CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What became of one row's latents, and the seconds it took."""

    row_id: int
    made: NDArray[Any] | Exception
    seconds: float

    def pixels(self) -> NDArray[Any]:
        """Return the picture, ``[H, W, 3]``, uint8, or raise what went wrong."""
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


class Decoding:
    """Decodes one picture at a time, in the order they came.

    Args:
        decoder: What decodes.
        device: Where it does.
        beside: Whether on a thread of its own; else when ``done`` is called.
    """

    def __init__(self, decoder: Decoder, device: torch.device, *, beside: bool = False) -> None:
        self._decoder = decoder
        self._waiting: list[tuple[int, Tensor]] = []  # in turn: until ``done``
        self._running: dict[Future[Decoded], Tensor] = {}  # beside, with the latents, should it need another try
        self._worker = ThreadPoolExecutor(1, "decode") if beside else None
        if self._worker is not None and device.type == "cpu":
            give_threads([self._worker], max(1, torch.get_num_threads() // 2))  # half is left to the steps

    @property
    def beside(self) -> bool:
        """Whether a picture is being decoded beside the steps just now."""
        return bool(self._running)

    def begin(self, row_id: int, latents: Tensor) -> None:
        """Take a row's latents, ``[4, h, w]``; nobody may change them any more."""
        if self._worker is None:
            self._waiting.append((row_id, latents))
            return
        ready = torch.cuda.current_stream(latents.device).record_event() if latents.is_cuda else None
        self._running[self._worker.submit(self._apart, row_id, latents, ready)] = latents

    def done(self, *, patiently: bool) -> list[Decoded]:
        """Return what is decoded, or failed; with ``patiently`` wait a moment for it."""
        waiting, self._waiting = self._waiting, []
        if patiently and self._running:
            wait(self._running, PATIENCE, FIRST_COMPLETED)
        over = {future: latents for future, latents in self._running.items() if future.done()}
        for future in over:
            del self._running[future]
        beside = [self._again(future.result(), latents) for future, latents in over.items()]
        return beside + [self._one(*item) for item in waiting]

    def _again(self, decoded: Decoded, latents: Tensor) -> Decoded:
        """Try once more, with no step beside it, what found too little memory."""
        short = isinstance(decoded.made, torch.OutOfMemoryError)
        return self._one(decoded.row_id, latents) if short else decoded

    def _one(self, row_id: int, latents: Tensor) -> Decoded:
        start = time.perf_counter()
        made: NDArray[Any] | Exception
        try:
            made = self._decoder.decode(latents).numpy()
        except Exception as error:  # noqa: BLE001  (the other pictures go on)
            made = error
        return Decoded(row_id, made, time.perf_counter() - start)

    def _apart(self, row_id: int, latents: Tensor, ready: Any) -> Decoded:
        """Decode on the worker's thread, on a stream of its own."""
        with torch.inference_mode(), self._stream(latents, ready):
            return self._one(row_id, latents)

    @contextmanager
    def _stream(self, latents: Tensor, ready: Any) -> Iterator[None]:
        """On CUDA: begin when the latents are there, and hold up nobody's kernels."""
        if ready is None:
            yield
            return
        stream = torch.cuda.Stream(latents.device)  # type: ignore[no-untyped-call]
        stream.wait_event(ready)
        latents.record_stream(stream)
        with torch.cuda.stream(stream):
            yield
