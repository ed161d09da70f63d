"""A worker whose database or files are away for a while: nothing is lost, nothing is deleted that somebody may need."""

import threading
import time

import pytest

from impasto.errors import Unavailable
from impasto.jobs.states import Status
from impasto.types import Progress
from impasto.worker.backend import FakeBackend
from tests.unit.test_worker import Rig, drain

PUBLISHING = "impasto.worker.publishing"


@pytest.fixture
def rig(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{PUBLISHING}.RETRY_SECONDS", 0.01)
    monkeypatch.setattr(f"{PUBLISHING}.PROBE_SECONDS", 0.0)
    return Rig(tmp_path)


class Files:
    """Lets files be away from now on, for some calls or until they are back."""

    def __init__(self, outputs, monkeypatch):
        self.left = 0
        for name in ("put", "probe", "get_input"):
            monkeypatch.setattr(outputs, name, self._wrapped(getattr(outputs, name)))

    def _wrapped(self, method):
        def call(*arguments):
            self.left -= 1
            if self.left >= 0:
                raise Unavailable("files cannot be stored or read now")
            return method(*arguments)

        return call


@pytest.fixture
def files(rig, monkeypatch):
    return Files(rig.outputs, monkeypatch)


def test_files_that_are_away_for_a_moment_are_waited_for(rig, files):
    """The steps are not done again, and the jobs complete at their first attempt."""
    ids = [rig.submit(num_inference_steps=2, seed=i, num_images=2) for i in range(2)]
    files.left = 5
    drain(rig.loop())
    assert [(job.status, job.attempt) for job in map(rig.store.get, ids)] == [(Status.COMPLETED, 1)] * 2


def test_a_job_whose_files_stay_away_goes_back_and_no_other_is_taken(rig, files):
    """The queue is not failed away while a disk is full: the worker waits, and goes on when there is room."""
    ids = [rig.submit(num_inference_steps=1, seed=i) for i in range(3)]
    files.left = 10**6
    loop = rig.loop(slots=1, lease_seconds=0.05)
    drain(loop)
    assert {rig.store.get(job_id).status for job_id in ids} == {Status.CREATED}
    assert sorted(rig.store.get(job_id).attempt for job_id in ids) == [0, 0, 1]

    files.left = 0
    drain(loop)
    assert {rig.store.get(job_id).status for job_id in ids} == {Status.COMPLETED}
    assert len(rig.files()) == 3


def test_a_job_whose_files_can_never_be_stored_is_given_up(rig, files):
    """At its last attempt it fails, with the reason."""
    job_id = rig.submit(num_inference_steps=1, seed=1)
    loop = rig.loop(lease_seconds=0.05, max_attempts=2)
    for _ in range(2):
        files.left = 10**6
        drain(loop)
        files.left = 0
        loop._publisher._away_since = None  # as if something small could be stored
    job = rig.store.get(job_id)
    assert (job.status, job.error_class, job.attempt) == (Status.FAILED, "storage", 2)
    assert "could not be stored" in job.error


def test_a_start_picture_that_cannot_be_read_now_is_read_later(rig, files):
    """It is not gone, so the job does not fail."""
    from PIL import Image

    job_id = rig.submit(pictures={"image": Image.new("RGB", (64, 64))}, num_inference_steps=1, seed=1, strength=0.5)
    files.left = 1
    drain(rig.loop())
    job = rig.store.get(job_id)
    assert (job.status, job.attempt) == (Status.COMPLETED, 2)


def test_a_result_whose_answer_was_lost_keeps_its_pictures(rig, monkeypatch):
    """The database commits and dies before it says so. Asked again, it says yes; the pictures are there."""
    job_id = rig.submit(num_inference_steps=1, seed=1)
    complete, calls = rig.store.complete, []

    def unheard(*arguments):
        done = complete(*arguments)
        calls.append(done)
        if len(calls) == 1:
            raise Unavailable("the connection broke")
        return done

    monkeypatch.setattr(rig.store, "complete", unheard)
    drain(rig.loop())
    [output] = rig.store.get(job_id).outputs
    assert rig.outputs.get(output.blob)
    assert calls == [True, True]


def test_a_result_that_nobody_answers_for_keeps_its_pictures(rig, monkeypatch):
    """The commit was done and the database stayed away: what the worker does not know, it does not delete."""
    job_id = rig.submit(num_inference_steps=1, seed=1)
    complete = rig.store.complete

    def unheard(*arguments):
        complete(*arguments)
        raise Unavailable("the connection broke")

    monkeypatch.setattr(rig.store, "complete", unheard)
    drain(rig.loop(lease_seconds=0.05))
    [output] = rig.store.get(job_id).outputs
    assert rig.outputs.get(output.blob)


def working(rig, **options):
    """A loop on a thread that has moved the only job by a step."""
    loop, moved = rig.loop(Moving(0.02), **options), threading.Event()
    loop._backend.moved = moved
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert moved.wait(20)
    return loop, thread


class Moving(FakeBackend):
    """Tells of its first step."""

    def step(self):
        events = super().step()
        if any(isinstance(event, Progress) for event in events):
            self.moved.set()
        return events


def test_a_worker_with_time_to_drain_finishes_its_jobs_and_takes_no_more(rig):
    """What waits, stays in the queue."""
    first, second = (rig.submit(num_inference_steps=20, seed=i) for i in range(2))
    loop, thread = working(rig, slots=1, drain_seconds=60.0)
    loop.stop()
    thread.join(30)
    assert rig.store.get(first).status is Status.COMPLETED
    assert (rig.store.get(second).status, rig.store.get(second).attempt) == (Status.CREATED, 0)


@pytest.mark.parametrize("how", ["time is over", "told twice"])
def test_what_is_not_done_in_time_goes_back(rig, how):
    """The end comes soon after the time for draining, or at the second signal."""
    job_id = rig.submit(num_inference_steps=50, seed=1)
    loop, thread = working(rig, drain_seconds=0.1 if how == "time is over" else 600.0)
    began = time.monotonic()
    loop.stop()
    if how == "told twice":
        loop.stop()
    thread.join(30)
    assert time.monotonic() - began < 10
    assert rig.store.get(job_id).status is Status.CREATED
