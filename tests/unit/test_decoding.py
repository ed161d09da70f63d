"""Pictures come out the same decoded in turn or beside the steps; what goes wrong is one picture's affair."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from impasto.engine.accel import Accel
from impasto.engine.decoding import PATIENCE, Decoded, Decoding
from impasto.engine.engine import Engine
from impasto.types import Event, Failed, Finished, GenerationRequest, ImageReady, Progress

CPU = torch.device("cpu")


class Slow:
    """A decoder that takes until it is let go, and notes who called it."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.threads: list[str] = []
        self.broken: list[Exception] = []

    def decode(self, latents: Tensor) -> Tensor:
        """The first channel as bytes."""
        self.threads.append(threading.current_thread().name)
        if not self.go.wait(10):
            raise TimeoutError("nobody let the decoder go")
        if self.broken:
            raise self.broken.pop()
        return latents[0].to(torch.uint8)


@pytest.fixture
def slow() -> Iterator[Slow]:
    """It is let go in the end, whatever happens."""
    made = Slow()
    yield made
    made.go.set()


@pytest.fixture(scope="module")
def builtin_engine() -> Engine:
    """The model in the package."""
    return Engine.load("builtin", device="cpu", dtype="float32")


def until_done(decoding: Decoding, count: int) -> list[Decoded]:
    """All that is to come."""
    found: list[Decoded] = []
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        found += decoding.done(patiently=True)
    return found


def test_in_turn_it_is_the_callers_thread(slow: Slow) -> None:
    slow.go.set()
    decoding = Decoding(slow, CPU)
    decoding.begin(3, torch.full((4, 2, 2), 7.0))
    assert not decoding.beside and not slow.threads
    (made,) = decoding.done(patiently=False)
    assert made.row_id == 3 and (made.pixels() == 7).all() and decoding.done(patiently=False) == []
    assert slow.threads == [threading.current_thread().name]


def test_beside_the_caller_goes_on(slow: Slow) -> None:
    """Nothing is waited for longer than a moment, and pictures come in the order in which they were handed in."""
    decoding = Decoding(slow, CPU, beside=True)
    for row in (1, 2):
        decoding.begin(row, torch.full((4, 2, 2), float(row)))
    start = time.perf_counter()
    assert decoding.done(patiently=False) == [] and decoding.done(patiently=True) == []
    assert time.perf_counter() - start < 40 * PATIENCE
    assert decoding.beside
    slow.go.set()
    found = until_done(decoding, 2)
    assert [(made.row_id, int(made.pixels()[0, 0])) for made in found] == [(1, 1), (2, 2)]
    assert threading.current_thread().name not in slow.threads and not decoding.beside


@pytest.mark.parametrize("beside", [False, True])
def test_what_fails_is_told_and_the_next_goes_on(slow: Slow, beside: bool) -> None:
    slow.go.set()
    slow.broken.append(ValueError("not finite"))
    decoding = Decoding(slow, CPU, beside=beside)
    for row in (1, 2):
        decoding.begin(row, torch.ones(4, 2, 2))
    first, second = until_done(decoding, 2)
    with pytest.raises(ValueError, match="not finite"):
        first.pixels()
    assert second.pixels().shape == (2, 2)


def test_too_little_memory_beside_is_tried_again_alone(slow: Slow) -> None:
    slow.go.set()
    slow.broken.append(torch.OutOfMemoryError("no room"))
    decoding = Decoding(slow, CPU, beside=True)
    decoding.begin(1, torch.ones(4, 2, 2))
    (made,) = until_done(decoding, 1)
    assert made.pixels().shape == (2, 2)
    assert slow.threads[-1] == threading.current_thread().name and len(slow.threads) == 2


def test_the_steps_keep_their_threads(slow: Slow) -> None:
    """The worker's share is its own: what it is told must not become everybody's."""
    slow.go.set()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        decoding = Decoding(slow, CPU, beside=True)
        decoding.begin(1, torch.ones(4, 2, 2))
        until_done(decoding, 1)
        assert torch.get_num_threads() == 4
        assert decoding._worker is not None and decoding._worker.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def events_of(engine: Engine, requests: dict[str, GenerationRequest]) -> list[Event]:
    """Everything that happens until all requests have ended."""
    for name, request in requests.items():
        engine.submit(request, name)
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def asked(prompt: str, steps: int = 3) -> GenerationRequest:
    """A small picture."""
    return GenerationRequest(prompt, width=128, height=128, num_inference_steps=steps, seed=4)


def test_pictures_are_the_same(builtin_engine: Engine) -> None:
    """But for rounding: fewer threads may add up in another order."""
    requests = {"a": asked("a red fox"), "b": asked("a green frog", 5)}
    pictures = []
    for engine in (builtin_engine, Engine(builtin_engine._model, decode_beside=True)):
        found = events_of(engine, requests)
        assert {event.request_id for event in found if isinstance(event, Finished)} == {"a", "b"}
        pictures.append({e.request_id: np.asarray(e.image, int) for e in found if isinstance(e, ImageReady)})
    for name in requests:
        assert np.abs(pictures[0][name] - pictures[1][name]).max() <= 1


def test_others_step_while_a_picture_is_decoded(
    builtin_engine: Engine, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short job's picture is held back; the long one moves on, and is not kept from its end."""
    engine = Engine(builtin_engine._model, decode_beside=True)
    decode = engine._model.vae.decode

    def held(latents: Tensor) -> Tensor:
        slow.go.wait(10)
        return decode(latents)

    monkeypatch.setattr(engine._model.vae, "decode", held)
    engine.submit(asked("a red fox", 1), "short")
    engine.submit(asked("a green frog", 6), "long")
    seen: list[Event] = []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (engine._pending or len(engine._scheduler)):
        seen += engine.step()
    assert not [event for event in seen if isinstance(event, ImageReady)]
    assert max(event.step for event in seen if isinstance(event, Progress) and event.request_id == "long") == 6
    slow.go.set()
    while engine.busy:
        seen += engine.step()
    assert [event.request_id for event in seen if isinstance(event, Finished)] == ["short", "long"]


def test_who_is_cancelled_meanwhile_gets_nothing(
    builtin_engine: Engine, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does its end disturb the one after."""
    engine = Engine(builtin_engine._model, decode_beside=True)
    decode = engine._model.vae.decode
    monkeypatch.setattr(engine._model.vae, "decode", lambda latents: slow.go.wait(10) and decode(latents))
    engine.submit(asked("a red fox", 1), "gone")
    engine.step()
    assert engine.cancel("gone")
    slow.go.set()
    found = events_of(engine, {"next": asked("a green frog", 1)})
    assert {event.request_id for event in found} == {"next"} and isinstance(found[-1], Finished)
    assert not [event for event in found if isinstance(event, Failed)]


def test_not_with_offload(caplog: pytest.LogCaptureFixture) -> None:
    """Networks that make room for each other cannot work at once."""
    engine = Engine.load("builtin", accel=Accel.parse("decode_beside,offload=all"))
    assert "decode_beside is off" in caplog.text and engine._decoding._worker is None
    assert Engine.load("builtin", accel=Accel.parse("decode_beside"))._decoding._worker is not None
