"""What leases promise: a silent worker loses its jobs, and a lost lease writes nothing."""

from __future__ import annotations

import pytest

from impasto.jobs.records import Beat, Lease, NewJob, Output
from impasto.jobs.store import JobStore

EXPIRED = -1.0  # seconds: a lease that is over the moment it is given
FOX = Output("fox.png", "image/png", 512, 512, nsfw=False, seed=7)


@pytest.fixture
def job_id(store: JobStore, alice: str) -> str:
    return store.create(NewJob("builtin", {}, alice, seed=7), max_queued=10).id


def claim(store: JobStore, worker: str = "worker", lease_seconds: float = 30) -> Lease:
    [job] = store.claim(worker, 1, lease_seconds)
    return job.lease


def test_a_heartbeat_keeps_the_lease(store, job_id):
    """It counts from the heartbeat on, even if the old one had just run out."""
    lease = claim(store, lease_seconds=EXPIRED)
    assert store.heartbeat("worker", {lease: {}}, 30) == Beat()
    assert store.reap(3) == []
    assert store.complete(lease, [FOX], {})


def test_a_heartbeat_shows_how_far_a_job_is(store, job_id):
    """Whatever the worker tells of it."""
    lease = claim(store)
    store.heartbeat("worker", {lease: {"step": 3, "total": 30}}, 30)
    assert store.get(job_id).progress == {"step": 3, "total": 30}


def test_one_heartbeat_serves_all_jobs_of_a_worker(store, alice):
    """Each job hears what concerns it alone: kept, lost or cancelled."""
    ids = [store.create(NewJob("builtin", {}, alice, seed=7), 10).id for _ in range(3)]
    kept, lost, stopped = (job.lease for job in store.claim("worker", 3, 30))
    store.release(lost)
    store.cancel(ids[2], alice)
    beat = store.heartbeat("worker", {kept: {"step": 1}, lost: {"step": 1}, stopped: {"step": 1}}, 30)
    assert beat == Beat(lost=frozenset({lost}), cancelled=frozenset({stopped}))
    assert [store.get(id).status for id in ids] == ["processing", "created", "cancelled"]


def test_a_heartbeat_of_an_idle_worker_is_nothing(store):
    """No jobs, no news."""
    assert store.heartbeat("worker", {}, 30) == Beat()


def test_a_lease_works_for_its_own_worker_only(store, job_id):
    """A mix-up of names does not keep a job from its worker."""
    lease = claim(store, "first")
    assert store.heartbeat("second", {lease: {}}, 30).lost == {lease}


def test_a_living_workers_job_is_not_taken_away(store, job_id):
    """The reaper touches only leases that ran out."""
    claim(store)
    assert store.reap(3) == []
    assert store.get(job_id).status == "processing"


def test_a_silent_workers_job_waits_again(store, job_id):
    """The reaper says which jobs it took; what the dead worker told of progress is gone."""
    lease = claim(store, lease_seconds=EXPIRED)
    store.heartbeat("worker", {lease: {"step": 3}}, EXPIRED)
    assert store.reap(3) == [job_id]
    job = store.get(job_id)
    assert (job.status, job.progress, job.attempt) == ("created", {}, 1)
    assert store.reap(3) == []


def test_the_successor_has_a_higher_attempt_and_the_same_seed(store, job_id):
    """So its picture is the one the first worker would have made."""
    claim(store, lease_seconds=EXPIRED)
    store.reap(3)
    [again] = store.claim("second", 1, 30)
    assert (again.id, again.attempt, again.seed) == (job_id, 2, 7)


def test_nothing_a_zombie_writes_counts(store, job_id):
    """A worker that froze past its lease and came back can do no harm, before or after its successor is done."""
    zombie = claim(store, "zombie", EXPIRED)
    store.reap(3)
    successor = claim(store, "successor")

    def haunt() -> None:
        before = store.get(job_id)
        assert store.heartbeat("zombie", {zombie: {"step": 99}}, 30).lost == {zombie}
        assert not store.complete(zombie, [FOX, FOX], {"inference": 1})
        assert not store.fail(zombie, "no", "x")
        assert not store.release(zombie)
        assert store.get(job_id) == before

    haunt()
    assert store.complete(successor, [FOX], {})
    haunt()


def test_a_zombie_cannot_write_to_a_job_that_waits_again(store, job_id):
    """Between two workers a job belongs to nobody."""
    zombie = claim(store, lease_seconds=EXPIRED)
    store.reap(3)
    assert not store.complete(zombie, [FOX], {})
    assert store.get(job_id).status == "created"


def test_a_released_job_goes_to_another_under_a_new_number(store, job_id):
    """A lease that was given back is as dead as one that was lost."""
    old = claim(store, "first")
    assert store.release(old)
    new = claim(store, "second")
    assert new.attempt > old.attempt
    assert not store.complete(old, [FOX], {})
    assert store.complete(new, [FOX], {})


def test_a_job_that_kills_its_workers_fails_the_third_time(store, job_id):
    """With the reason in words that its owner can act on."""
    for _ in range(2):
        claim(store, lease_seconds=EXPIRED)
        assert store.reap(3) == [job_id]
        assert store.get(job_id).status == "created"
    claim(store, lease_seconds=EXPIRED)
    assert store.reap(3) == [job_id]
    job = store.get(job_id)
    assert (job.status, job.error_class) == ("failed", "worker_lost")
    assert job.error.startswith("the worker died 3 times while running this job")
    assert store.claim("worker", 1, 30) == []


def test_one_attempt_means_one(store, job_id):
    """``max_attempts=1`` gives up after the first death, and counts it right."""
    claim(store, lease_seconds=EXPIRED)
    store.reap(1)
    assert store.get(job_id).error.startswith("the worker died once")


def test_handing_a_job_back_does_not_count_against_it(store, job_id):
    """A service that restarts ten times must not fail the job it was at."""
    for _ in range(10):
        assert store.release(claim(store))
    claim(store, lease_seconds=EXPIRED)
    store.reap(2)
    assert store.get(job_id).status == "created"


def test_a_cancelled_job_whose_worker_died_is_cancelled(store, job_id, alice):
    """Nobody runs it a second time."""
    claim(store, lease_seconds=EXPIRED)
    store.cancel(job_id, alice)
    assert store.reap(3) == [job_id]
    assert store.get(job_id).status == "cancelled"


def test_an_end_that_is_told_again_is_what_it_was(store, alice):
    """The database may die between a commit and its answer: the worker says it once more and learns the truth.

    So it never deletes the pictures of a job that is completed, nor the start pictures of one that runs again.
    """
    ids = [store.create(NewJob("builtin", {}, alice, seed=7), 10).id for _ in range(3)]
    done, failed, released = (job.lease for job in store.claim("worker", 3, 30))
    for _ in range(2):
        assert store.complete(done, [FOX], {})
        assert store.fail(failed, "no", "x")
        assert store.release(released)
    assert [store.get(id).status for id in ids] == ["completed", "failed", "created"]
    assert not store.fail(done, "no", "x") and not store.complete(failed, [FOX], {})
    [again] = store.claim("worker", 1, 30)
    assert store.release(released), "what it did is still true"
    assert store.get(again.id).status == "processing"


def test_a_cancel_that_came_first_is_told_again_as_no(store, job_id, alice):
    """The result stays unseen, however often it is sent."""
    lease = claim(store)
    store.cancel(job_id, alice)
    assert [store.complete(lease, [FOX], {}) for _ in range(2)] == [False, False]
