"""Pictures are checked, encoded and stored while the next steps run; only whole jobs complete, and nothing is left."""

import threading
import time

import pytest

from impasto.jobs.states import Status
from impasto.types import ImageReady
from impasto.worker.backend import FakeBackend
from tests.unit.test_worker import Rig, drain


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path)


class Held:
    """Lets no picture be stored until told to."""

    def __init__(self, outputs, monkeypatch):
        self.go, self.waiting = threading.Event(), threading.Event()
        put = outputs.put

        def held(*arguments):
            self.waiting.set()
            assert self.go.wait(60)
            return put(*arguments)

        monkeypatch.setattr(outputs, "put", held)


@pytest.fixture
def held(rig, monkeypatch):
    held = Held(rig.outputs, monkeypatch)
    yield held
    held.go.set()


def test_other_jobs_move_while_a_picture_is_being_stored(rig, held):
    """A storage that does not answer holds up one job; the long one beside it goes on step by step, and then both
    complete."""
    short, long = rig.submit(num_inference_steps=1, seed=1), rig.submit(num_inference_steps=30, seed=2)
    loop = rig.loop()
    loop.turn()
    assert held.waiting.wait(60)
    for _ in range(10):
        assert loop.turn()
    loop._beat()
    assert rig.store.get(long).progress["step"] >= 10
    assert rig.store.get(short).status is Status.PROCESSING

    held.go.set()
    drain(loop)
    assert [rig.store.get(job_id).status for job_id in (short, long)] == [Status.COMPLETED] * 2


def test_a_job_that_is_being_stored_keeps_its_slot(rig, held):
    """So that pictures which nobody can store do not pile up."""
    first, second = (rig.submit(num_inference_steps=1, seed=seed) for seed in (1, 2))
    loop = rig.loop(slots=1)
    for _ in range(4):
        assert loop.turn()
    assert rig.store.get(first).status is Status.PROCESSING
    assert rig.store.get(second).status is Status.CREATED
    held.go.set()
    drain(loop)
    assert rig.store.get(second).status is Status.COMPLETED


class Backwards(FakeBackend):
    """Delivers the pictures of a request last first."""

    def step(self):
        events = super().step()
        ready = [event for event in events if isinstance(event, ImageReady)]
        return [*ready[::-1], *(event for event in events if event not in ready)]


def test_pictures_are_in_the_requests_order_whenever_they_were_stored(rig):
    """Three pictures, the last stored first."""
    job_id = rig.submit(num_inference_steps=1, num_images=3, seed=10)
    drain(rig.loop(Backwards(0)))
    assert [output.seed for output in rig.store.get(job_id).outputs] == [10, 11, 12]


def test_a_job_that_is_lost_while_a_picture_is_stored_leaves_no_file(rig, held):
    """Cancelled meanwhile: the picture that arrives afterwards is deleted."""
    job_id = rig.submit(num_inference_steps=1, seed=1)
    loop = rig.loop()
    loop.turn()
    assert held.waiting.wait(60)
    rig.store.cancel(job_id, rig.key_id)
    loop._beat()
    loop.turn()
    assert rig.store.get(job_id).status is Status.CANCELLED

    held.go.set()
    drain(loop)
    assert rig.files() == []


def test_a_worker_that_is_told_to_go_leaves_no_file_of_an_unfinished_job(rig, held):
    """What is being stored is waited for, the job goes back to the queue, and its picture is deleted."""
    job_id = rig.submit(num_inference_steps=1, seed=1)
    loop = rig.loop()
    loop.turn()
    assert held.waiting.wait(60)
    held.go.set()
    loop._hand_back()
    assert rig.store.get(job_id).status is Status.CREATED
    assert rig.files() == []


class Broken(FakeBackend):
    """Gives a second picture that no file can be made of."""

    def step(self):
        events = super().step()
        return [
            ImageReady(e.request_id, e.index, e.seed, "no picture") if isinstance(e, ImageReady) and e.index else e
            for e in events
        ]


def test_a_picture_that_cannot_be_stored_fails_its_job_alone_and_takes_its_others_along(rig):
    """One of two pictures is broken: the job fails, the stored one is deleted, the job beside it completes."""
    broken, good = rig.submit(num_inference_steps=1, num_images=2, seed=1), rig.submit(num_inference_steps=2, seed=3)
    drain(rig.loop(Broken(0)))
    assert [rig.store.get(job_id).status for job_id in (broken, good)] == [Status.FAILED, Status.COMPLETED]
    assert len(rig.files()) == 1


class Slow(FakeBackend):
    """Takes its time for a step, as a full-size model on a CPU does."""

    def step(self):
        time.sleep(2)
        return super().step()


def test_where_steps_are_long_a_job_is_complete_before_the_next_one(rig):
    """A tenth of a step is waited for its pictures: nobody waits another step for a picture that is there."""
    short, long = rig.submit(num_inference_steps=1, seed=1), rig.submit(num_inference_steps=30, seed=2)
    loop = rig.loop(Slow(0))
    for _ in range(3):  # a busy machine may need more than the tenth
        loop.turn()
        if rig.store.get(short).status is Status.COMPLETED:
            break
    assert rig.store.get(short).status is Status.COMPLETED
    assert rig.store.get(long).status is Status.PROCESSING
