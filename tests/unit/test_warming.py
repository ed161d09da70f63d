"""LoRA files are read and made ready on the thread that fetched them, before the engine needs them."""

import os
import threading
import time

import pytest

from impasto.errors import LoraError
from impasto.jobs.states import Status
from impasto.types import GenerationRequest, LoraRef
from impasto.worker.backend import FakeBackend
from impasto.worker.loras import LoraLibrary
from impasto.worker.warming import CHUNK, Warming, read_ahead
from tests.unit.test_worker import Rig

PATIENCE = 60.0  # seconds until a test that waits for a thread has failed


class Claimed:
    """What the worker knows of a job it has, as far as that matters here."""

    def __init__(self, deaths):
        self.suspect = deaths > 0
        self.ended = threading.Event()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_every_byte_is_read(tmp_path, size):
    """Of files below, at and above the size of a chunk."""
    (tmp_path / "f").write_bytes(os.urandom(size))
    assert read_ahead(tmp_path / "f") == size


def test_a_file_that_is_gone_is_left_to_whoever_parses_it(tmp_path):
    """It is their error to tell, with the field's name."""
    assert read_ahead(tmp_path / "gone") == 0


def test_finding_a_lora_reads_it(tmp_path, monkeypatch):
    """Whatever its name leads to."""
    (tmp_path / "me.safetensors").write_bytes(b"x" * 100)
    seen = []
    monkeypatch.setattr("impasto.worker.loras.read_ahead", lambda file: seen.append(file))
    LoraLibrary(tmp_path).find("me", "loras.0.path", None)
    assert seen == [tmp_path / "me.safetensors"]


class Preloading(FakeBackend):
    """Makes files ready at a gate, and remembers whose and in what order."""

    def __init__(self, error=None):
        super().__init__(0)
        self.gate = threading.Event()
        self.error = error
        self.began, self.stopped, self.submitted = [], [], []

    def preload(self, request, stop):
        self.began.append(request)
        assert self.gate.wait(PATIENCE)
        self.stopped.append(stop())
        if self.error:
            raise self.error

    def submit(self, request, request_id=None, **options):
        self.submitted.append(request)
        return super().submit(request, request_id, **options)


def turned(loop, until):
    """Turn a loop until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline
        loop.turn()


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path)
    (tmp_path / "loras").mkdir()
    for name in "abc":
        (tmp_path / "loras" / f"{name}.safetensors").write_bytes(b"x" * 100)
    return made


def test_a_waiting_job_is_made_ready_while_others_run(rig):
    """It joins when it is ready; until then the others' steps go on, and jobs without LoRAs are not made ready."""
    backend = Preloading()
    loop = rig.loop(backend)
    waiting = rig.submit(loras=(LoraRef("a", 0.5),), num_inference_steps=2, seed=1)
    other = rig.submit(num_inference_steps=3, seed=2)
    turned(loop, lambda: rig.store.get(other).status is Status.COMPLETED)
    turned(loop, lambda: backend.began)
    assert rig.store.get(waiting).status is Status.PROCESSING
    assert len(backend.submitted) == 1
    backend.gate.set()
    turned(loop, lambda: rig.store.get(waiting).status is Status.COMPLETED)
    (ready,) = backend.began
    assert ready == backend.submitted[1]
    assert ready.loras[0].path == str(rig.folder / "loras" / "a.safetensors")


def test_a_job_that_is_cancelled_meanwhile_is_not_wanted_any_more(rig):
    """Whoever makes it ready can ask; of the job beside it that is not told."""
    backend = Preloading()
    loop = rig.loop(backend)
    jobs = [rig.submit(loras=(LoraRef(name, 0.5),), num_inference_steps=1, seed=1) for name in "ab"]
    turned(loop, lambda: len(backend.began) == len(jobs))
    rig.store.cancel(jobs[0], rig.key_id)
    loop._beat()
    loop.turn()
    backend.gate.set()
    turned(loop, lambda: rig.store.get(jobs[1]).status is Status.COMPLETED and len(backend.stopped) == 2)
    assert sorted(backend.stopped) == [False, True]
    assert len(backend.submitted) == 1


@pytest.mark.parametrize("error", [LoraError("loras.0.path", "is broken"), RuntimeError("unheard of")])
def test_an_error_while_it_is_made_ready_is_not_the_jobs(rig, error):
    """Its start will meet the same again and tell it, or go well."""
    backend = Preloading(error)
    backend.gate.set()
    job = rig.submit(loras=(LoraRef("a", 0.5),), num_inference_steps=1, seed=1)
    turned(rig.loop(backend), lambda: rig.store.get(job).status is not Status.CREATED and backend.submitted)
    assert len(backend.began) == 1


def test_a_job_that_may_end_workers_is_not_made_ready_beside_others(tmp_path):
    """A file may be what does it, so a suspect's is read when it runs alone."""
    made = []
    warming = Warming(lambda request, stop: made.append(request))
    request = GenerationRequest("a fox", loras=(LoraRef("a"),))
    for deaths in (0, 1):
        warming.warm(Claimed(deaths), request)
    assert made == [request]


def test_a_job_that_is_gone_is_not_made_ready(tmp_path):
    """It was cancelled while it waited for its turn."""
    made, running = [], Claimed(0)
    running.ended.set()
    Warming(lambda request, stop: made.append(request)).warm(running, GenerationRequest("a fox", loras=(LoraRef("a"),)))
    assert not made
