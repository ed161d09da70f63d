"""A process killed at any moment loses no job that it was told is safe."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pysqlite3.dbapi2 as sqlite

from impasto.jobs.database import open_database, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.states import Status
from impasto.jobs.store import JobStore

# Tells every acknowledgement of the store the moment it has it; reaps, so that the dead ones' jobs come back.
WORKLOAD = """
import os, sys
from impasto.jobs.database import open_database
from impasto.jobs.records import NewJob, Output
from impasto.jobs.store import JobStore
url, key_id, worker = sys.argv[1:]
store = JobStore(open_database(url))
say = lambda *words: os.write(1, (" ".join(words) + "\\n").encode())
while True:
    say("accepted", store.create(NewJob("fake", {}, key_id, seed=1), 10_000).id)
    for job in store.claim(worker, 2, lease_seconds=0.2):
        blob = f"{worker}/{job.attempt}"
        if store.complete(job.lease, [Output(blob, "image/png", 8, 8, False, 1)], {}):
            say("completed", job.id, blob)
    store.reap(max_attempts=1000)
"""


def run_and_kill(url: str, key_id: str, seconds: float, round: int) -> list[list[str]]:
    """Let two workers run for ``seconds``, kill both with SIGKILL, and return what they had acknowledged."""
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKLOAD, url, key_id, f"worker-{round}-{n}"], stdout=subprocess.PIPE)
        for n in range(2)
    ]
    first = [process.stdout.readline() for process in processes]  # both are at work
    time.sleep(seconds)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    rest = [process.communicate(timeout=30)[0] for process in processes]
    return [line.decode().split() for line in b"".join(first + rest).splitlines()]


def test_kill_9_loses_no_acknowledged_row(tmp_path: Path):
    """Six kills of two busy processes: each accepted job exists, each acknowledged completion stands, once."""
    url = f"sqlite:///{tmp_path}/impasto.db"
    engine = open_database(url)
    upgrade(engine)
    keys = KeyStore(engine)
    key_id = keys.authenticate(keys.create("alice")).id
    moments = random.Random(0)
    said = [words for n in range(3) for words in run_and_kill(url, key_id, moments.uniform(0.2, 0.7), n)]
    accepted = [words[1] for words in said if words[0] == "accepted"]
    completed = [(words[1], words[2]) for words in said if words[0] == "completed"]
    assert len(accepted) >= 6

    store = JobStore(engine)
    assert len(set(accepted)) == len(accepted)
    for id in accepted:
        store.get(id)
    for id, blob in completed:
        assert [output.blob for output in store.get(id).outputs] == [blob]

    time.sleep(0.3)  # the last leases run out
    store.reap(max_attempts=1000)
    while jobs := store.claim("successor", 50, 30):
        assert all(store.complete(job.lease, [], {}) for job in jobs)
    assert {store.get(id).status for id in accepted} == {Status.COMPLETED}
    with sqlite.connect(tmp_path / "impasto.db") as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        twice = "select prediction_id from events where type = 'completed' group by 1 having count(*) > 1"
        assert db.execute(twice).fetchall() == []
    db.close()
    store.close()
    engine.dispose()
