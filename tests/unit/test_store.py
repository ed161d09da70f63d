"""What the job store promises to whoever hands jobs in: accepted is kept, owned, limited, and told as it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from impasto.errors import NotFound, TooManyRequests, Unauthorized, Unavailable
from impasto.jobs.database import reading, writing
from impasto.jobs.events import ChangeWatcher
from impasto.jobs.records import NewJob, Output
from impasto.jobs.states import Status
from impasto.jobs.store import JobStore

FOX = Output("fox.png", "image/png", 1024, 768, nsfw=False, seed=7)


def a_job(key_id: str, **changes) -> NewJob:
    return NewJob(**{"model": "builtin", "input": {"prompt": "a fox"}, "key_id": key_id, "seed": 7, **changes})


def submit(store: JobStore, key_id: str, **changes):
    return store.create(a_job(key_id, **changes), max_queued=1000)


def claim_one(store: JobStore):
    [job] = store.claim("worker", 1, lease_seconds=30)
    return job


# Accepting


def test_a_new_job_waits_with_all_that_was_handed_in(store, alice):
    """Nothing is lost or changed on the way in, whatever characters a prompt has."""
    given = {"prompt": 'a "fox" 🦊 \0 \ud800', "size": [1024, 768], "nested": {"none": None}}
    job = submit(store, alice, input=given, seed=9_999_999_999)
    assert (job.status, job.attempt, job.key_id, job.seed, job.input) == ("created", 0, alice, 9_999_999_999, given)
    assert (job.outputs, job.error, job.progress, job.timings) == ((), "", {}, {})
    assert (job.started_at, job.finished_at, job.cancel_requested) == (None, None, False)
    assert store.get(job.id) == job


def test_ids_are_32_hexadecimal_digits_and_never_repeat(store, alice):
    """An id is random, so it tells nothing about other jobs."""
    ids = {submit(store, alice).id for _ in range(50)}
    assert len(ids) == 50
    assert all(len(id) == 32 and set(id) <= set("0123456789abcdef") for id in ids)


def test_times_are_utc_to_the_millisecond(store, alice):
    """``created_at`` is an aware datetime by the database's clock, without stray microseconds."""
    created = submit(store, alice).created_at
    assert created.tzinfo is UTC
    assert created.microsecond % 1000 == 0
    assert abs(datetime.now(UTC) - created) < timedelta(seconds=10)


def test_an_accepted_job_is_there_for_another_process(store, alice, database):
    """``create`` returns after the commit, so any other connection sees the row."""
    job = submit(store, alice)
    assert JobStore(database).get(job.id) == job


def test_a_full_queue_refuses_and_stores_nothing(store, alice, bob):
    """One key's flood is stopped at its limit, and costs another key nothing."""
    for _ in range(3):
        store.create(a_job(alice), max_queued=3)
    with pytest.raises(TooManyRequests, match="3 jobs of this key are waiting") as caught:
        store.create(a_job(alice), max_queued=3)
    assert caught.value.retry_after > 0
    assert store.queue_depth() == 3
    store.create(a_job(bob), max_queued=3)


def test_a_claimed_job_makes_room_in_the_queue(store, alice):
    """The limit counts waiting jobs, not running ones."""
    store.create(a_job(alice), max_queued=1)
    claim_one(store)
    store.create(a_job(alice), max_queued=1)


def test_submits_at_once_do_not_slip_past_the_limit(store, alice):
    """Sixteen threads race for five places: five get one."""

    def attempt(_):
        try:
            return store.create(a_job(alice), max_queued=5)
        except TooManyRequests:
            return None

    with ThreadPoolExecutor(8) as pool:
        accepted = [job for job in pool.map(attempt, range(16)) if job]
    assert len(accepted) == store.queue_depth() == 5


def test_a_revoked_key_submits_nothing(store, alice, keys):
    """A request that was let in just before the revocation comes too late."""
    keys.revoke(alice)
    with pytest.raises(Unauthorized, match="revoked"):
        submit(store, alice)
    assert store.queue_depth() == 0


@pytest.mark.parametrize("cost", [0, -1, float("nan"), float("inf")])
def test_a_senseless_cost_is_refused(alice, cost):
    """One such number would spoil the order for everybody."""
    with pytest.raises(ValueError, match="cost"):
        a_job(alice, cost=cost)


# Submitting again


def test_the_same_idempotency_key_is_the_same_job(store, alice):
    """A client that lost the answer may ask again, in whatever state the job is by now, even if its queue is full."""
    first = submit(store, alice, idempotency_key="order-1")
    assert submit(store, alice, idempotency_key="order-1") == first
    running = claim_one(store)
    submit(store, alice)
    again = store.create(a_job(alice, idempotency_key="order-1"), max_queued=1)
    assert (again.id, again.status) == (running.id, "processing")


def test_idempotency_keys_of_two_owners_are_two_jobs(store, alice, bob):
    """Nobody can meet another's job by guessing."""
    assert submit(store, alice, idempotency_key="1").id != submit(store, bob, idempotency_key="1").id


def test_repeats_at_once_make_one_job(store, alice):
    """Eight threads send the same request in the same instant."""
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: submit(store, alice, idempotency_key="x"), range(8)))
    assert len({job.id for job in jobs}) == store.queue_depth() == 1


# Looking


def test_another_keys_job_looks_like_no_job(store, alice, bob):
    """The answers are equal to the letter, so ids cannot be probed."""
    job = submit(store, alice)
    assert store.get(job.id, alice) == job
    with pytest.raises(NotFound) as foreign:
        store.get(job.id, bob)
    with pytest.raises(NotFound) as missing:
        store.get("0" * 32, bob)
    assert str(foreign.value) == str(missing.value)


NO_IDS = ["", "x" * 32, "A" * 32, "0" * 31, "0" * 33, "0" * 32 + "\n", "' or 1=1", "\0", "\ud800"]


@pytest.mark.parametrize("id", NO_IDS)
def test_what_is_no_id_is_simply_not_found(store, alice, id):
    """Text from an address never upsets the database."""
    for look in (lambda: store.get(id), lambda: store.cancel(id, alice)):
        with pytest.raises(NotFound):
            look()


# Ending


def test_a_completed_job_shows_its_outputs_and_timings(store, alice):
    """All at once, with the time it ended."""
    job = submit(store, alice)
    assert store.complete(claim_one(store).lease, [FOX, FOX], {"inference": 1234})
    done = store.get(job.id)
    assert (done.status, done.outputs, done.timings) == (Status.COMPLETED, (FOX, FOX), {"inference": 1234})
    assert done.created_at <= done.started_at <= done.finished_at


def test_a_failed_job_says_why(store, alice):
    """In words for its owner and one word for programs; text that no database holds is made harmless."""
    job = submit(store, alice)
    assert store.fail(claim_one(store).lease, "loras.0 was\0 not found \ud800", "LoraError")
    failed = store.get(job.id)
    assert (failed.status, failed.error, failed.error_class) == ("failed", "loras.0 was not found ?", "LoraError")
    assert failed.finished_at is not None


def test_a_finished_job_never_changes_again(store, alice):
    """Whatever its former worker or its owner still says."""
    job = submit(store, alice)
    lease = claim_one(store).lease
    store.complete(lease, [FOX], {"inference": 1})
    done = store.get(job.id)
    assert store.complete(lease, [], {}), "as its worker may say again, if the answer was lost"
    assert not store.fail(lease, "too late", "x")
    assert not store.release(lease)
    assert store.heartbeat("worker", {lease: {"step": 9}}, 30).lost == {lease}
    assert store.cancel(job.id, alice) == done
    assert store.reap(1) == []
    assert store.get(job.id) == done


# Cancelling


def test_a_waiting_job_is_cancelled_at_once(store, alice):
    """No worker ever sees it."""
    cancelled = store.cancel(submit(store, alice).id, alice)
    assert (cancelled.status, cancelled.error) == ("cancelled", "cancelled")
    assert cancelled.finished_at is not None
    assert store.claim("worker", 1, 30) == []


def test_a_running_job_is_cancelled_at_its_workers_next_heartbeat(store, alice):
    """Until then it runs on, marked; the heartbeat ends it and tells the worker to drop it."""
    job = submit(store, alice)
    lease = claim_one(store).lease
    marked = store.cancel(job.id, alice)
    assert (marked.status, marked.cancel_requested) == ("processing", True)
    beat = store.heartbeat("worker", {lease: {}}, 30)
    assert (beat.cancelled, beat.lost) == ({lease}, frozenset())
    assert store.get(job.id).status == "cancelled"
    assert store.heartbeat("worker", {lease: {}}, 30).lost == {lease}


ENDINGS = {
    "complete": lambda store, lease: store.complete(lease, [FOX], {}),
    "fail": lambda store, lease: store.fail(lease, "broken", "x"),
    "release": lambda store, lease: store.release(lease),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_cancel_that_came_first_wins(store, alice, ending):
    """The owner was told that the job stops: no result, no failure and no second run may follow."""
    job = submit(store, alice)
    lease = claim_one(store).lease
    store.cancel(job.id, alice)
    assert not ENDINGS[ending](store, lease)
    ended = store.get(job.id)
    assert (ended.status, ended.outputs, ended.error) == ("cancelled", (), "cancelled")


def test_nobody_cancels_anothers_job(store, alice, bob):
    """It is not found, and goes on."""
    job = submit(store, alice)
    with pytest.raises(NotFound):
        store.cancel(job.id, bob)
    assert store.get(job.id) == job


# The record


def history(database, job_id: str) -> list[str]:
    with reading(database) as db:
        rows = db.execute(text("select type from events where prediction_id = :id order by seq"), {"id": job_id})
        return [row.type for row in rows]


def attempts(database, job_id: str) -> list[tuple[int, str, str]]:
    query = "select attempt, worker, outcome from attempts where prediction_id = :id order by attempt"
    with reading(database) as db:
        return [tuple(row) for row in db.execute(text(query), {"id": job_id})]


def test_every_change_of_state_is_on_record(store, alice, database):
    """One event for each, in order, and one line for each run of a worker."""
    job = submit(store, alice)
    store.claim("first", 1, lease_seconds=-1)
    store.reap(3)
    [second] = store.claim("second", 1, 30)
    store.release(second.lease)
    [third] = store.claim("third", 1, 30)
    store.complete(third.lease, [FOX], {})
    assert history(database, job.id) == [
        "created", "started", "requeued", "started", "requeued", "started", "completed"
    ]  # fmt: skip
    assert attempts(database, job.id) == [(1, "first", "lease_lost"), (2, "second", "released"), (3, "third", "ok")]


def test_a_cancelled_run_and_a_failed_run_are_on_record(store, alice, database):
    """With the outcome that tells them apart."""
    stopped, broken = submit(store, alice), submit(store, alice)
    leases = {job.id: job.lease for job in store.claim("worker", 2, 30)}
    store.cancel(stopped.id, alice)
    store.heartbeat("worker", {leases[stopped.id]: {}}, 30)
    store.fail(leases[broken.id], "no", "x")
    assert history(database, stopped.id) == ["created", "started", "cancelled"]
    assert history(database, broken.id) == ["created", "started", "failed"]
    assert attempts(database, stopped.id) == [(1, "worker", "cancelled")]
    assert attempts(database, broken.id) == [(1, "worker", "error")]


def test_a_change_and_its_event_commit_together_or_not_at_all(store, alice, database):
    """If the event cannot be written, the job has not completed either."""
    job = submit(store, alice)
    lease = claim_one(store).lease
    with writing(database) as db:
        db.execute(text("alter table events rename to elsewhere"))
    with pytest.raises((Unavailable, ProgrammingError)):
        store.complete(lease, [FOX], {})
    assert store.get(job.id).status == "processing"


# Hints of change


def test_the_hint_changes_when_another_connection_commits(store, alice, database):
    """And rests while nothing happens, though the number itself means nothing."""
    before = store.changes()
    assert store.changes() == before
    submit(JobStore(database), alice)
    after = store.changes()
    assert after != before
    assert store.changes() == after


def test_a_watcher_wakes_soon_after_a_change(store, alice):
    """A poll of a cheap number stands behind every long wait."""
    watcher = ChangeWatcher(store)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watcher.wait, 10)
        submit(store, alice)
        assert waiting.result(timeout=5)


def test_a_watcher_gives_up_in_time(store):
    """Without a change it returns false after the time given."""
    assert not ChangeWatcher(store).wait(0.05)


def test_a_change_between_looking_and_waiting_is_not_missed(store, alice):
    """A watcher compares with the moment it was made, not with the moment the wait began."""
    watcher = ChangeWatcher(store)
    submit(store, alice)
    assert watcher.wait(0)
    assert not watcher.wait(0)
