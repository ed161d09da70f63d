"""Jobs whose clients hung up: withdrawn before they begin, found again by the same request, ended when nobody comes.

Where two may act at once, both do, many times over: whatever the order, one story is true afterwards.
"""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from impasto.errors import Conflict
from impasto.jobs import store as module
from impasto.jobs.database import open_database, reading, writing
from impasto.jobs.queries import queries
from impasto.jobs.records import NewJob
from impasto.jobs.states import Status
from impasto.jobs.store import WITHDRAWN, JobStore

ROUNDS = 40


def job(key: str, body: str | None = "h", **values: Any) -> NewJob:
    """A synchronous request's job."""
    return NewJob("sdxl", {}, key, seed=1, body_hash=body, **({"held": True} | values))


def together(*actions: Any) -> list[Any]:
    """Run actions at the same moment; return what each gave."""
    start = threading.Barrier(len(actions))

    def act(action: Any) -> Any:
        start.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(act, actions))


def test_a_worker_and_a_hang_up_at_once(store, alice):
    """The job is begun or withdrawn, never both and never neither."""
    for turn in range(ROUNDS):
        id = store.create(job(alice, str(turn)), 1000).id
        claimed, withdrawn = together(lambda: store.claim("ann", 1, 60), lambda id=id: store.drop(id))
        assert bool(claimed) != withdrawn
        assert store.get(id).withdrawn == withdrawn


def test_one_of_many_that_come_again_gets_the_job(store, alice):
    """The others are new wishes, as they would be with nobody hung up."""
    for turn in range(ROUNDS // 4):
        first = store.create(job(alice, str(turn)), 1000)
        store.drop(first.id)
        ids = [made.id for made in together(*[lambda t=turn: store.create(job(alice, str(t)), 1000)] * 4)]
        assert ids.count(first.id) == 1
        assert len(set(ids)) == 4


def test_coming_again_and_the_end_of_the_time_at_once(store, alice, monkeypatch):
    """Either the job waits again and is this request's, or it is cancelled and another was made."""
    for turn in range(ROUNDS):
        monkeypatch.setattr(module, "REJOIN_SECONDS", 15.0)
        first = store.create(job(alice, str(turn)), 1000)
        store.drop(first.id)
        monkeypatch.setattr(module, "REJOIN_SECONDS", 0.0)  # over for the reaper
        again, _ = together(lambda t=turn: store.create(job(alice, str(t)), 1000), lambda: store.reap(3))
        ended = store.get(first.id)
        assert not store.get(again.id).withdrawn
        if again.id == first.id:
            assert ended.status is Status.CREATED
        else:
            assert (ended.status, ended.error) == (Status.CANCELLED, WITHDRAWN)


def test_any_process_ends_what_another_one_withdrew(store, alice, database_url, monkeypatch):
    """The database knows all there is to know: the process that was told of the hang-up may be dead."""
    monkeypatch.setattr(module, "REJOIN_SECONDS", 0.0)
    id = store.create(job(alice), 10).id
    assert store.drop(id)
    engine = open_database(database_url)
    other = JobStore(engine)
    assert other.reap(3) == []  # it names jobs that were taken from workers
    assert other.get(id).status is Status.CANCELLED
    other.close()
    engine.dispose()


def test_a_withdrawn_job_is_out_of_the_way(store, alice, bob):
    """It fills no queue, delays nobody and is not due; a cancel by its owner ends it as any other."""
    id = store.create(job(alice), 1).id
    store.drop(id)
    assert store.queue_depth() == 0
    others = [store.create(job(key, "other"), 1).id for key in (alice, bob)]
    assert {claimed.id for claimed in store.claim("ann", 9, 60)} == set(others)
    assert store.cancel(id, alice).status is Status.CANCELLED
    assert store.create(job(alice), 10).id != id


def test_a_job_that_was_begun_once_is_not_withdrawn(store, alice):
    """Its worker died or handed it back; the next one goes on."""
    id = store.create(job(alice), 10).id
    (claimed,) = store.claim("ann", 1, 60)
    store.release(claimed.lease)
    assert not store.drop(id)
    assert [again.id for again in store.claim("ben", 1, 60)] == [id]


def test_a_dropped_asynchronous_request_goes_on_and_is_found_again(store, alice):
    """Its client may read the prediction later, by the list or a webhook."""
    id = store.create(job(alice, held=False), 10).id
    assert not store.drop(id, withdraw=False)
    assert [claimed.id for claimed in store.claim("ann", 1, 60)] == [id]
    assert store.create(job(alice, held=False), 10).id == id
    assert store.create(job(alice, held=False), 10).id != id


def test_requests_without_a_body_hash_never_meet(store, alice):
    """Jobs made by other means than a request are not the same as each other."""
    id = store.create(job(alice, None), 10).id
    store.drop(id)
    assert store.create(job(alice, None), 10).id != id


def test_an_idempotency_key_has_one_body_until_its_job_is_deleted(store, alice, database):
    """Another body under the same key is a mistake of the client; a deleted job leaves its key to the next."""
    first = store.create(job(alice, "a", idempotency_key="k"), 10)
    with pytest.raises(Conflict, match="Idempotency-Key"):
        store.create(job(alice, "b", idempotency_key="k"), 10)
    assert store.create(job(alice, "a", idempotency_key="k"), 10).id == first.id
    with writing(database) as db:
        db.execute(text("update predictions set deleted_at = 1 where id = :id"), {"id": first.id})
    assert store.create(job(alice, "b", idempotency_key="k"), 10).id != first.id


def test_holders_are_told_from_the_rest(store, alice):
    """A synchronous request is seen as long as its job has not ended and it did not hang up."""
    id = store.create(job(alice), 10).id
    store.create(job(alice, "async", held=False), 10)
    assert 0 <= store.held_for(alice, "h") < 60
    assert store.held_for(alice, "async") is store.held_for("other", "h") is None
    store.drop(id)
    assert store.held_for(alice, "h") is None


QUICK = {
    "find_repeat": "idempotency_key=?",
    "find_dropped": "predictions_of_body",
    "find_held": "predictions_of_body",
    "count_waiting_of_key": "predictions_waiting_of_key",
    "end_withdrawn": "predictions_withdrawn",
}


@pytest.mark.parametrize("name", QUICK)
def test_a_long_history_does_not_slow_a_submit(tmp_path, empty_sqlite, name):
    """What each submit and each reap asks is answered from an index of the few rows that matter."""
    engine = open_database(f"sqlite:///{shutil.copy(empty_sqlite, tmp_path / 'impasto.db')}")
    statement = queries("sqlite")[name]
    with reading(engine) as db:
        values = dict.fromkeys(statement.compile().params)
        (plan, *_) = db.execute(text(f"explain query plan {statement.text}"), values)
    assert QUICK[name] in plan.detail
    engine.dispose()
