"""What the order of work promises: each job to one worker, every key its share, nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import text

from impasto.jobs.database import reading
from impasto.jobs.queries import queries
from impasto.jobs.records import NewJob
from impasto.jobs.store import AFFINITY_BUCKET, JobStore


def submit(store: JobStore, key_id: str, count: int = 1, **changes) -> list[str]:
    values = {"model": "builtin", "input": {}, "key_id": key_id, "seed": 7, **changes}
    return [store.create(NewJob(**values), max_queued=10_000).id for _ in range(count)]


def claim(store: JobStore, n: int = 1, **options) -> list[str]:
    return [job.id for job in store.claim("worker", n, 30, **options)]


def drain(store: JobStore, n: int = 1, **options) -> list[str]:
    """Claim until nothing is left; the order in which jobs went out."""
    order: list[str] = []
    while ids := claim(store, n, **options):
        order += ids
    return order


# What a claim gives


def test_an_empty_queue_gives_nothing(store):
    """No job, no error."""
    assert store.claim("worker", 4, 30) == []


def test_a_claimed_job_is_processing_and_has_a_lease(store, alice):
    """The lease carries the number of this attempt."""
    [id] = submit(store, alice)
    [job] = store.claim("worker", 4, 30)
    assert (job.id, job.status, job.attempt) == (id, "processing", 1)
    assert (job.lease.id, job.lease.attempt) == (id, 1)
    assert job.started_at >= job.created_at
    assert store.get(id) == job


def test_jobs_of_one_key_go_out_in_the_order_they_came(store, alice):
    """Singly or in batches."""
    ids = submit(store, alice, 10)
    assert claim(store, 3) == ids[:3]
    assert drain(store) == ids[3:]


def test_no_more_jobs_are_given_than_asked_for(store, alice):
    """A worker asks for its free places; with none it gets none."""
    submit(store, alice, 5)
    assert len(claim(store, 0)) == 0
    assert len(claim(store, -1)) == 0
    assert len(claim(store, 2)) == 2
    assert store.queue_depth() == 3


def test_a_worker_sees_only_its_pool(store, alice):
    """Jobs for other machines stay where they are."""
    submit(store, alice, pool="large")
    assert claim(store, 4) == []
    assert store.queue_depth() == 0
    assert store.queue_depth("large") == 1
    assert len(claim(store, 4, pool="large")) == 1


def test_priority_goes_before_everything(store, alice):
    """Before age and before loaded LoRAs."""
    [plain] = submit(store, alice, lora_key=("ink",))
    [low] = submit(store, alice, priority=-1)
    [high] = submit(store, alice, priority=1, lora_key=("oil",))
    assert drain(store, loaded=["ink"]) == [high, plain, low]


# One job, one worker


def test_many_threads_never_claim_the_same_job(store, alice):
    """Sixty claims race for fifty jobs: each job goes out once, and ten claims get nothing."""
    ids = submit(store, alice, 50)
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim(store), range(60)))
    assert sorted(id for got in claimed for id in got) == sorted(ids)
    assert claimed.count([]) == 10


CLAIMER = """
import sys
from impasto.jobs.database import open_database
from impasto.jobs.store import JobStore
store = JobStore(open_database(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
while jobs := store.claim(sys.argv[2], 3, 30):
    for job in jobs:
        print(job.id, flush=True)
"""


def test_many_processes_never_claim_the_same_job(store, alice, database_url):
    """Three processes that start together share ninety jobs without an overlap or a remainder."""
    ids = submit(store, alice, 90)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, database_url, f"worker-{n}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    claimed = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(id for got in claimed for id in got) == sorted(ids)


# Fair shares


def test_a_small_key_behind_a_flood_is_served_by_its_share(store, alice, bob):
    """900 jobs of one key wait when another sends 20: the two take turns, so the small one ends after some 40."""
    submit(store, alice, 900)
    small = set(submit(store, bob, 20))
    order = claim(store, 200) + claim(store, 200)
    last = max(place for place, id in enumerate(order) if id in small)
    assert last <= 45


def test_a_key_that_comes_while_a_flood_is_served_waits_no_longer(store, alice, bob):
    """Its share counts from now: neither behind the flood nor with credit for the time it was silent."""
    submit(store, alice, 60)
    drained = [claim(store, 1) for _ in range(30)]
    assert all(drained)
    small = set(submit(store, bob, 5))
    order = drain(store)
    assert max(place for place, id in enumerate(order) if id in small) <= 12


def test_work_done_while_nobody_else_waited_is_not_held_against_a_key(store, alice, bob):
    """After 50 jobs alone, alice's next one does not queue behind all of bob's first 50."""
    submit(store, alice, 50)
    drain(store, 10)
    submit(store, bob, 50)
    [late] = submit(store, alice)
    assert drain(store).index(late) <= 3


def test_shares_are_counted_in_work_not_in_jobs(store, alice, bob):
    """While alice's jobs cost four times as much, bob gets four for each of hers."""
    large = set(submit(store, alice, 20, cost=4.0))
    submit(store, bob, 80, cost=1.0)
    first = drain(store)[:50]
    assert Counter(id in large for id in first)[True] in range(9, 12)


def test_a_job_that_comes_back_keeps_its_place(store, alice, bob):
    """A worker's death or drain does not send a job to the end of the line."""
    [first, *_] = submit(store, alice, 10)
    [job] = store.claim("worker", 1, 30)
    submit(store, bob, 10)
    store.release(job.lease)
    assert claim(store) == [first]


# LoRAs that are loaded already


def test_a_job_whose_loras_are_loaded_goes_a_little_ahead(store, alice):
    """Changing adapters costs time, so within a small stretch the worker's own choice comes first."""
    [oil] = submit(store, alice, lora_key=("oil",))
    [ink] = submit(store, alice, lora_key=("ink",))
    assert claim(store, loaded=["ink"]) == [ink]
    assert claim(store, loaded=["ink"]) == [oil]


def test_fewer_missing_loras_are_better(store, alice):
    """A job that needs none to be loaded beats one that needs one, which beats one that needs two."""
    [none] = submit(store, alice, lora_key=("x", "y"))
    [half] = submit(store, alice, lora_key=("ink", "x"))
    [full] = submit(store, alice, lora_key=("ink", "oil"))
    [bare] = submit(store, alice)
    assert drain(store, loaded=["oil", "ink"]) == [full, bare, half, none]


def test_affinity_ends_at_the_edge_of_a_bucket(store, alice):
    """A job is overtaken by one key's jobs for a bucket of work at most, however many of the loaded kind wait."""
    [oil] = submit(store, alice, lora_key=("oil",))
    submit(store, alice, 30, lora_key=("ink",))
    assert drain(store, loaded=["ink"]).index(oil) <= AFFINITY_BUCKET


def test_a_steady_stream_of_the_loaded_kind_starves_nobody(store, alice, bob):
    """Jobs that keep coming move on in virtual time; the one that waits does not."""
    [oil] = submit(store, alice, lora_key=("oil",))
    order: list[str] = []
    for _ in range(20):
        submit(store, bob, lora_key=("ink",))
        order += claim(store, loaded=["ink"])
    assert oil in order[: int(AFFINITY_BUCKET) + 1]


def test_any_text_may_name_a_lora(store, alice):
    """Names come from users; none may upset a claim."""
    odd = "\0 \ud800 'ink' \"oil\" ]} 🦊 \\u0000"
    [other] = submit(store, alice, lora_key=("other",))
    [named] = submit(store, alice, lora_key=(odd,))
    assert drain(store, loaded=[odd]) == [named, other]


# Speed


def test_a_claim_reads_the_queue_by_its_index(store, database):
    """However many finished jobs the table keeps, a claim touches only the front of the queue."""
    if database.dialect.name != "sqlite":
        return
    values = {"pool": "default", "limit": 1, "worker": "w", "lease": 1, "loaded": "[]", "bucket": 4.0}
    with reading(database) as db:
        plan = db.execute(text(f"explain query plan {queries('sqlite')['claim_jobs']}"), values)
        steps = [row.detail for row in plan]
    assert any("predictions_waiting" in step for step in steps), steps
    assert not any(step.startswith("SCAN predictions") for step in steps), steps
