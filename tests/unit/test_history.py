"""What is promised of jobs of the past: pages, deletion, expiry, and sweeping that never takes what is needed."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import text

from impasto.errors import NotFound
from impasto.jobs.database import reading, writing
from impasto.jobs.history import History, Wanted
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import NewJob, Output
from impasto.jobs.states import Status
from impasto.jobs.sweeping import Sweeper
from impasto.jobs.uploads import UploadStore

HOUR = 3600.0


@pytest.fixture
def outputs(tmp_path):
    return OutputStore(str(tmp_path / "outputs"))


@pytest.fixture
def history(database, outputs):
    return History(database, outputs)


def files(outputs, job_id: str) -> set[str]:
    return set(outputs.older(f"{job_id}/", 0))


def age(database, seconds: float) -> None:
    """Let time go by for every job and attempt."""
    by = round(seconds * 1000)
    with writing(database) as db:
        for table, column in (
            ("predictions", "created_at"), ("predictions", "finished_at"), ("predictions", "deleted_at"),
            ("attempts", "ended_at"),
        ):  # fmt: skip
            db.execute(text(f"update {table} set {column} = {column} - {by}"))


def rows(database, table: str) -> int:
    with reading(database) as db:
        return db.execute(text(f"select count(*) from {table}")).scalar_one()


class Desk:
    """Makes jobs and does their work."""

    def __init__(self, store, outputs, key_id: str) -> None:
        self.store, self.outputs, self.key_id = store, outputs, key_id

    def submit(self, **values):
        """A waiting job with a start picture."""
        values = {"model": "m", "input": {"pictures": {"image": self.outputs.put_input(b"in")}}} | values
        return self.store.create(NewJob(key_id=self.key_id, seed=1, **values), 1000)

    def start(self):
        [job] = self.store.claim("w", 1, 60)
        return job

    def draw(self, job) -> Output:
        blob = self.outputs.put(job.id, job.attempt, 0, b"png", "image/png")
        return Output(blob, "image/png", 8, 8, False, 1)

    def done(self, **values):
        """A completed job."""
        self.submit(**values)
        job = self.start()
        assert self.store.complete(job.lease, [self.draw(job)], {})
        return self.store.get(job.id)


@pytest.fixture
def desk(store, outputs, alice):
    return Desk(store, outputs, alice)


# Pages


def test_pages_are_stable_and_the_callers_alone(history, store, outputs, desk, alice, bob):
    """Jobs of one millisecond have an order, too; another key's are never among them."""
    made = [desk.submit().id for _ in range(7)]
    Desk(store, outputs, bob).submit()
    pages = [history.page(alice, Wanted(page=page, page_size=3)) for page in (1, 2, 3, 4)]
    assert [len(jobs) for jobs, _ in pages] == [3, 3, 1, 0]
    assert {total for _, total in pages} == {7}
    assert sorted(job.id for jobs, _ in pages for job in jobs) == sorted(made)
    times = [job.created_at for jobs, _ in pages for job in jobs]
    assert times == sorted(times, reverse=True)


def test_a_page_is_cut_by_what_is_wanted(history, store, desk, alice):
    """Model, status and time, from the one up to but without the other."""
    done, waiting, stopped = desk.done(model="a"), desk.submit(model="b"), desk.submit(model="b")
    store.cancel(stopped.id, alice)

    def found(**wanted) -> set[str]:
        jobs, total = history.page(alice, Wanted(**wanted))
        assert len(jobs) == total
        return {job.id for job in jobs}

    assert found(model="a") == {done.id}
    assert found(status=Status.CREATED) == {waiting.id}
    assert found(status=Status.FAILED) == found(status=Status.CANCELLED) == {stopped.id}
    assert found(model="b", status=Status.COMPLETED) == set()
    moment = timedelta(milliseconds=1)
    assert done.id in found(after=done.created_at)
    assert done.id not in found(after=done.created_at + moment)
    assert done.id not in found(after=done.created_at + moment / 2)
    assert done.id not in found(before=done.created_at)
    assert done.id in found(before=done.created_at + moment)


# Deletion


def test_a_deleted_job_is_hidden_at_once_and_purged_an_hour_later(history, store, database, outputs, desk, alice):
    """With every row and file of it; one that was not deleted stays."""
    gone, stays = desk.done(), desk.done()
    assert history.delete(alice, [gone.id, gone.id, "x"]) == 1
    with pytest.raises(NotFound):
        store.get(gone.id)
    assert files(outputs, gone.id) == set()
    assert history.purge() == 0
    age(database, HOUR + 60)
    late = outputs.put(gone.id, 1, 1, b"written by a worker that had lost it", "image/png")
    assert history.purge() == 1
    assert late not in files(outputs, gone.id)
    assert [rows(database, table) for table in ("predictions", "attempts")] == [1, 1]
    assert store.get(stays.id).outputs == stays.outputs
    assert files(outputs, stays.id) == {stays.outputs[0].blob}


def test_a_job_that_runs_is_not_purged_before_it_ended(history, store, database, desk, alice):
    """Its owner deleted it; its worker has yet to notice."""
    desk.submit()
    job = desk.start()
    history.delete(alice, [job.id])
    age(database, 2 * HOUR)
    assert history.purge() == 0
    assert job.lease in store.heartbeat("w", {job.lease: {}}, 60).cancelled
    assert history.purge() == 1


def test_nobody_deletes_anothers_job(history, store, desk, bob):
    """It looks like one that never was."""
    job = desk.submit()
    assert history.delete(bob, [job.id]) == 0
    assert store.get(job.id).status == Status.CREATED


# Expiry


def test_pictures_expire_and_their_job_stays(history, store, database, outputs, desk):
    """Each in its time, once; a job that runs, and one that has just ended, keep theirs."""
    old = desk.done()
    age(database, 100)
    desk.submit()
    running = desk.start()
    drawn = desk.draw(running).blob
    desk.submit()
    young = desk.start()
    store.complete(young.lease, [desk.draw(young)], {})
    assert history.expire(200) == 0
    assert history.expire(100) == 1
    assert history.expire(100) == 0
    assert files(outputs, old.id) == set()
    assert files(outputs, running.id) == {drawn}
    assert len(files(outputs, young.id)) == 1
    after = store.get(old.id)
    assert (after.status, after.outputs) == (Status.COMPLETED, old.outputs)
    assert after.expired_at is not None
    assert store.get(young.id).expired_at is None


# What crashes leave


def test_a_dead_attempts_pictures_are_swept_and_no_others(history, store, database, outputs, desk, alice):
    """The worker was killed; the second attempt's picture stays, while it runs and when it is done."""
    desk.submit()
    first = desk.start()
    dead = desk.draw(first).blob
    store.abandon("w")
    store.reap(3)
    second = desk.start()
    alive = desk.draw(second)
    assert (first.id, second.attempt) == (second.id, first.attempt + 1)
    assert history.sweep_attempts() == 0
    age(database, 2 * HOUR)
    assert files(outputs, first.id) == {dead, alive.blob}
    assert history.sweep_attempts() == 1
    assert files(outputs, first.id) == {alive.blob}
    assert store.complete(second.lease, [alive], {})
    age(database, 2 * HOUR)
    assert history.sweep_attempts() == 0
    assert files(outputs, first.id) == {alive.blob}


def test_start_pictures_go_when_nobody_needs_them(history, store, outputs, desk, alice):
    """A cancelled job's and one without any job; those of jobs that wait or run stay, and so does a fresh one."""
    waiting, stopped = desk.submit(), desk.submit()
    store.cancel(stopped.id, alice)
    orphan = outputs.put_input(b"no row came")
    needed = waiting.input["pictures"]["image"]
    assert history.sweep_inputs() == 0
    assert history.sweep_inputs(0) == 2
    assert set(outputs.older("inputs/", 0)) == {needed}
    running = desk.start()
    assert history.sweep_inputs(0) == 0
    store.complete(running.lease, [], {})
    assert history.sweep_inputs(0) == 1
    assert orphan not in set(outputs.older("inputs/", 0))


def test_many_processes_sweep_at_once(database, store, outputs, desk, alice):
    """Everything goes once, nothing is an error, and the one that lives stays."""
    olds = [desk.done() for _ in range(12)]
    age(database, 100)
    young = desk.done()
    errors = []

    def sweep() -> None:
        uploads = UploadStore(database, outputs, kept=HOUR)
        sweeper = Sweeper(History(database, outputs), uploads, output_seconds=50, grace=0)
        try:
            for _ in range(3):
                sweeper.sweep()
        except Exception as error:  # noqa: BLE001  (a thread's error must reach the test)
            errors.append(error)

    threads = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(files(outputs, old.id) == set() for old in olds)
    assert all(store.get(old.id).expired_at for old in olds)
    assert files(outputs, young.id) == {young.outputs[0].blob}


def test_one_kind_that_fails_does_not_keep_the_others(database, outputs, desk, monkeypatch, caplog):
    """A bucket that answers nonsense today may answer tomorrow; what failed is in the log."""
    old = desk.done()
    age(database, 100)
    uploads = UploadStore(database, outputs, kept=HOUR)
    monkeypatch.setattr(uploads, "sweep", lambda: 1 / 0)
    sweeper = Sweeper(History(database, outputs), uploads, output_seconds=50)
    assert sweeper.sweep() == {"expired jobs": 1}
    assert files(outputs, old.id) == set()
    assert "uploads could not be swept" in caplog.text


@pytest.mark.parametrize(("seconds", "pause"), [(0, 60), (1, 0.5), (100, 10), (10**6, 60)])
def test_sweeps_come_often_enough(history, database, outputs, seconds, pause):
    """Pictures outlive their time by a tenth of it, or by a minute, and no sweep follows at once."""
    uploads = UploadStore(database, outputs, kept=HOUR)
    assert Sweeper(history, uploads, output_seconds=seconds).pause == pause
