"""Databases as operators treat them: checked for damage, copied in use, and asked how it is going; on both kinds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from impasto.errors import ConfigError
from impasto.jobs.database import open_database, writing
from impasto.jobs.history import History
from impasto.jobs.outputs import OutputStore
from impasto.jobs.overview import Overview
from impasto.jobs.queue import Place, QueueView
from impasto.jobs.records import NewJob, Output
from impasto.jobs.store import JobStore
from impasto.jobs.sweeping import Sweeper
from impasto.jobs.upkeep import backup, check, require_newest
from impasto.jobs.uploads import UploadStore
from impasto.jobs.webhooks import WebhookStore
from impasto.jobs.workers import WorkerReport, WorkerReports
from impasto.worker.stats import WorkerStats

IMPASTO = Path(sys.executable).with_name("impasto")
FOX = Output("fox.png", "image/png", 8, 8, nsfw=False, seed=7)


def new(key: str, **values) -> NewJob:
    return NewJob("fake", {}, key, seed=1, **values)


@pytest.fixture
def lives(store, alice):
    """Ids of predictions of every kind, by what became of them."""
    names = ("completed", "failed", "cancelled", "again", "running", "waiting")
    ids = {name: store.create(new(alice, webhook_url="http://hook"), 100).id for name in names}
    leases = {job.id: job.lease for job in store.claim("ann", 5, 60)}
    store.complete(leases[ids["completed"]], [FOX], {})
    store.fail(leases[ids["failed"]], "no", "x")
    store.release(leases[ids["again"]])
    store.cancel(ids["cancelled"], alice)
    store.heartbeat("ann", {leases[ids["cancelled"]]: {}}, 60)
    return ids


def test_a_store_in_the_middle_of_its_life_is_sound(database, lives):
    """Every state there is, and nothing to complain of."""
    assert check(database) == []


DAMAGE = {
    "update predictions set status = 'failed' where id = :running": ["end", "lease", "attempts", "time", "webhook"],
    "delete from events where prediction_id = :completed": ["end is not on record"],
    "insert into events (prediction_id, type, at) values (:failed, 'failed', 1)": ["end is not on record"],
    "insert into events (prediction_id, type, at) values (:waiting, 'completed', 1)": ["end is not on record"],
    "update predictions set lease_until = null where id = :running": ["without a lease"],
    "update predictions set lease_owner = 'ann', lease_until = 1 where id = :waiting": ["have one and do not run"],
    "update attempts set outcome = 'error' where prediction_id = :completed": ["one attempt delivered"],
    "update attempts set outcome = 'ok' where prediction_id = :failed": ["one attempt delivered"],
    "update attempts set outcome = null, ended_at = null where prediction_id = :again": ["attempts without an end"],
    "update predictions set finished_at = null where id = :completed": ["without a time of their end"],
    "update predictions set finished_at = 1 where id = :waiting": ["others with one"],
    "delete from webhooks where prediction_id = :cancelled": ["webhook was never written"],
}


@pytest.mark.parametrize("statement", DAMAGE)
def test_each_kind_of_damage_is_named(database, lives, statement):
    """With the predictions concerned, so that somebody can look at them."""
    [name] = re.findall(r":(\w+)", statement)
    with writing(database) as db:
        db.execute(text(statement), {name: lives[name]})
    found = check(database)
    for words in DAMAGE[statement]:
        assert any(words in problem.what for problem in found), (words, found)
    assert {id for problem in found for id in problem.ids} == {lives[name]}


def test_tables_of_another_version_are_told_before_anything_is_read(database):
    """With the remedy."""
    with writing(database) as db:
        db.execute(text("update alembic_version set version_num = '0001'"))
    [problem] = check(database)
    assert "revision 0001" in problem.what and "impasto db upgrade" in problem.what
    with pytest.raises(ConfigError, match="impasto db upgrade"):
        require_newest(database)


def test_a_damaged_file_is_told(tmp_path, empty_sqlite):
    """A page of zeros in the middle, as a bad disk leaves it."""
    path = tmp_path / "impasto.db"
    data = bytearray(empty_sqlite.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(data)
    engine = open_database(f"sqlite:///{path}")
    [problem] = check(engine)
    assert problem.what.startswith("the file is damaged")
    engine.dispose()


def test_a_backup_in_use_is_whole(tmp_path, empty_sqlite):
    """Made while jobs come in: it opens, is sound, and has a beginning of them, without gaps."""
    (tmp_path / "impasto.db").write_bytes(empty_sqlite.read_bytes())
    engine = open_database(f"sqlite:///{tmp_path}/impasto.db")
    from impasto.jobs.keys import KeyStore

    keys, store, made, stop = KeyStore(engine), JobStore(engine), [], threading.Event()
    key_id = keys.authenticate(keys.create("alice")).id

    def submit():
        while not stop.is_set():
            made.append(store.create(new(key_id), 100_000).id)

    thread = threading.Thread(target=submit)
    thread.start()
    while len(made) < 20:
        time.sleep(0.01)
    backup(engine, tmp_path / "copy.db")
    stop.set()
    thread.join()
    copy = open_database(f"sqlite:///{tmp_path}/copy.db")
    assert check(copy) == []
    with copy.connect() as db:
        there = set(db.execute(text("select id from predictions")).scalars())
    assert len(there) >= 20 and there == set(made[: len(there)])
    for opened in (copy, engine):
        opened.dispose()


def test_a_backup_overwrites_nothing_and_knows_its_limits(database, tmp_path):
    """A file that is there stays; for PostgreSQL the right tool is named, and no password."""
    (tmp_path / "there").write_text("precious")
    with pytest.raises(ConfigError, match=r"is there already|pg_dump"):
        backup(database, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "precious"
    secret = open_database("postgresql://u:secret@host/db")
    with pytest.raises(ConfigError, match=r"pg_dump.*postgresql://u@host/db"):
        backup(secret, tmp_path / "new")


# The queue as those who wait see it


def test_places_are_the_order_of_work(store, database, alice):
    """1 is next; who runs or has ended has none."""
    ids = [store.create(new(alice, priority=priority), 100).id for priority in (0, 0, 5)]
    look = QueueView(database).look()
    assert look.positions == {ids[2]: 1, ids[0]: 2, ids[1]: 3}
    assert look.seconds_per_place is None, "nothing has run yet"
    [job] = store.claim("ann", 1, 60)
    assert job.id == ids[2]
    assert QueueView(database).look().positions == {ids[0]: 1, ids[1]: 2}


def test_an_estimate_comes_from_what_took_how_long_and_how_many_run(store, database, alice):
    """Jobs of 8 s, two at a time: a place is worth 4 s."""
    ids = [store.create(new(alice), 100).id for _ in range(6)]
    for job in store.claim("ann", 2, 60):
        store.complete(job.lease, [FOX], {})
    with writing(database) as db:
        db.execute(text("update predictions set started_at = finished_at - 8000 where status = 'completed'"))
    store.claim("ann", 2, 60)
    view = QueueView(database)
    assert view.look().seconds_per_place == pytest.approx(4.0)
    deadline = time.monotonic() + 20
    while (place := view.place(ids[5])) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert place == Place(2, 8)
    assert view.place(ids[0]) is None


def test_many_who_ask_cost_one_look(store, database, alice, monkeypatch):
    """A poll never asks the database for its place."""
    id = store.create(new(alice), 100).id
    view, looks = QueueView(database), []
    look = view.look
    monkeypatch.setattr(view, "look", lambda: looks.append(1) or look())
    deadline = time.monotonic() + 20
    while view.place(id) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    for _ in range(1000):
        view.place(id)
    assert len(looks) <= 2


# Retention


def age(database, seconds: float) -> None:
    with writing(database) as db:
        db.execute(text("update predictions set finished_at = finished_at - :ms"), {"ms": round(seconds * 1000)})


def test_old_predictions_are_forgotten_whole(store, database, alice, tmp_path):
    """Rows, pictures, attempts, events and webhooks; not the young, the running, nor those with a webhook to send."""
    outputs = OutputStore(str(tmp_path / "outputs"))
    history = History(database, outputs)
    ids = [store.create(new(alice, webhook_url="http://hook" if n == 1 else None), 100).id for n in range(4)]
    for job in store.claim("ann", 3, 60):
        if job.id != ids[2]:
            blob = outputs.put(job.id, 1, 0, b"x", "image/png")
            store.complete(job.lease, [Output(blob, "image/png", 8, 8, nsfw=False, seed=1)], {})
    assert history.forget(60) == 0
    age(database, 100)
    assert history.forget(60) == 1
    assert history.forget(60) == 0
    with writing(database) as db:
        db.execute(text("update predictions set deleted_at = deleted_at - 10"))
    assert history.purge(grace=0) == 1
    with database.connect() as db:
        for table, column in (("predictions", "id"), ("events", "prediction_id"), ("attempts", "prediction_id")):
            left = set(db.execute(text(f"select {column} from {table}")).scalars())
            assert ids[0] not in left and {ids[1], ids[2]} <= left
    assert {path.parts[-3] for path in (tmp_path / "outputs").rglob("*.png")} == {ids[1]}

    outbox = WebhookStore(database)
    [event] = outbox.claim(5, 60)
    outbox.delivered(event)
    assert history.forget(60) == 1


def test_the_sweeper_forgets_where_the_setting_says_so(store, database, alice, tmp_path):
    """0 keeps everything."""
    outputs = OutputStore(str(tmp_path / "outputs"))
    history, uploads = History(database, outputs), UploadStore(database, outputs, kept=60, quota=None)
    store.create(new(alice), 100)
    [job] = store.claim("ann", 1, 60)
    store.complete(job.lease, [], {})
    age(database, 100)
    assert Sweeper(history, uploads).sweep() == {}
    assert Sweeper(history, uploads, keep_seconds=60).sweep() == {"old jobs": 1}
    assert Sweeper(history, uploads, keep_seconds=5).pause == 0.5


# Overview


def test_an_overview_tells_workers_queue_and_rates(store, database, alice, lives):
    """From what workers report and what the rows say."""
    stats = WorkerStats(slots=4)
    stats.note(3, 0, {})
    stats.ended("completed", 7)
    WorkerReports(database).report(WorkerReport("w-1", "w", "cuda:0", "default", stats.snapshot()))
    seen = Overview.of(database)
    [worker] = seen.workers
    assert (worker.id, worker.device, worker.running, worker.slots, worker.completed) == ("w-1", "cuda:0", 3, 4, 7)
    assert worker.there
    [queue] = seen.queues
    assert (queue.waiting, queue.running) == (2, 1)
    assert [(ended.completed, ended.failed, ended.cancelled) for ended in seen.ended] == [(1, 1, 1)] * 3


def impasto(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([IMPASTO, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_commands(database_url, store, alice, tmp_path):
    """``db upgrade``, ``db check``, ``status``: on either database, for people and for programs."""
    where = ("--database-url", database_url, "--data-dir", tmp_path)
    assert impasto("db", "upgrade", *where).returncode == 0
    checked = impasto("db", "check", *where)
    assert (checked.returncode, checked.stdout) == (0, "all is well\n")
    assert impasto("status", *where).returncode == 0
    store.create(new(alice), 10)
    alone = impasto("status", *where)
    assert alone.returncode == 1, "a job waits and nobody is there to do it"
    assert "Workers" in alone.stdout and "none" in alone.stdout
    told = json.loads(impasto("status", "--json", *where).stdout)
    assert told["queues"][0]["waiting"] == 1
    assert told["disks"][0]["free_bytes"] > 0

    with writing(store.engine) as db:
        db.execute(text("update predictions set finished_at = 1"))
    broken = impasto("db", "check", "--json", *where)
    assert broken.returncode == 1
    assert json.loads(broken.stdout)[0]["ids"]


def test_commands_make_no_database(tmp_path):
    """A wrong folder is told, not filled."""
    for command in (("status",), ("db", "check"), ("db", "backup", tmp_path / "b.db")):
        run = impasto(*command, "--data-dir", tmp_path / "nowhere")
        assert run.returncode == 2
        assert "there is no database" in run.stderr
    assert not (tmp_path / "nowhere" / "impasto.db").exists()
