"""How many jobs can the store take, hand out and finish, and is it fair? ``python -m benchmarks.store``.

The physics: every accepted job and every end is a commit that waits for the disk, so one client's wall clock tells
about the disk; the CPU time of client and server tells what a job costs. An SDXL picture takes a GPU a second or so:
a store that manages fifty jobs a second feeds a rack. The fair tags let a small key behind another's flood take its
equal share at once: of two keys with 900 and 100 jobs, the small one is done after about 200 jobs in all, where
first come, first served would have it wait for all 1000.

Prints a table, then one line of JSON, which is also written to ``benchmarks/results/store.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.events import ChangeWatcher
from impasto.jobs.keys import KeyStore
from impasto.jobs.records import Job, NewJob, Output
from impasto.jobs.store import JobStore
from tests.chaos.programs import own_postgres

RESULT: Final = Path(__file__).parent / "results" / "store.json"
FLOOD, SMALL, BATCH = 900, 100, 4
LORAS = 8
WAKES = 40
INPUT = {"request": {"prompt": "x" * 600, "width": 1024, "height": 1024}, "output": {"format": "png"}}
PICTURE = Output("0" * 32 + "/1-" + "0" * 32 + "/0.png", "image/png", 1024, 1024, nsfw=False, seed=1)
# Client CPU, milliseconds a job, of the statements alone (no limits, no events) in an experiment before this was built.
EXPECTED: Final = {
    "sqlite": {"enqueue": 0.68, "claim 4": 0.24, "complete": 0.68, "get": 0.18},
    "postgresql": {"enqueue": 0.76, "claim 4": 0.20, "complete": 0.65, "get": 0.35},
}


def main() -> None:
    """Measure both databases and report."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--jobs", type=int, default=400, help="for each figure")
    jobs = asked.parse_args().jobs
    rows = []
    for name, opened in (("sqlite", _sqlite), ("postgresql", _postgresql)):
        with opened() as (url, server_cpu):
            rows.append({"database": name, **measure(url, server_cpu, jobs)})
    result = {"benchmark": "store", "jobs": jobs, "rows": rows, "machine": describe()}
    _print(rows)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


Clock = Callable[[], float]  # CPU seconds so far


@contextmanager
def _sqlite() -> Iterator[tuple[str, Clock]]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/impasto.db", lambda: 0.0


@contextmanager
def _postgresql() -> Iterator[tuple[str, Clock]]:
    with own_postgres() as server:
        yield server.url, lambda: _cpu_of_children(server.pid)


def _cpu_of_children(parent: int) -> float:
    """CPU seconds of a process and of those that it started (proc_pid_stat(5))."""
    total = 0
    for pid in [parent, *(int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def measure(url: str, server_cpu: Clock, jobs: int) -> dict[str, Any]:
    """All figures of one database."""
    engine = open_database(url)
    upgrade(engine)
    store, keys = JobStore(engine), KeyStore(engine)
    alice, bob = (keys.authenticate(keys.create(name)).id for name in ("alice", "bob"))
    costs = {}

    def timed(name: str, act: Callable[[], int]) -> None:
        wall, client, server = time.perf_counter(), time.process_time(), server_cpu()
        done = act()
        costs[name] = {
            "per_second": round(done / (time.perf_counter() - wall)),
            "client_ms": round((time.process_time() - client) / done * 1000, 2),
            "server_ms": round((server_cpu() - server) / done * 1000, 2),
        }

    _through(store, alice, 20, 1)  # connections and prepared statements, not counted
    ids: list[str] = []
    for size in (1, BATCH):
        held: list[Job] = []
        timed("enqueue", lambda: _extend(ids, _submit(store, alice, jobs)))
        timed(f"claim {size}", partial(_claim_all, store, size, held))
        timed("complete", partial(_complete, store, held))
    timed("get", lambda: sum(bool(store.get(id).id) for id in ids))
    found = {"costs": costs, "fairness": fairness(store, alice, bob), "wake_ms": wakes(url, store, alice)}
    store.close()
    engine.dispose()
    return found


def _extend(ids: list[str], more: list[str]) -> int:
    ids += more
    return len(more)


def _submit(store: JobStore, key: str, jobs: int) -> list[str]:
    made = []
    for number in range(jobs):
        lora = (f"lora-{number % LORAS}",)
        made.append(store.create(NewJob("sdxl", INPUT, key, seed=1, lora_key=lora), 100_000).id)
    return made


def _claim_all(store: JobStore, size: int, held: list[Job]) -> int:
    before = len(held)
    while jobs := store.claim("bench", size, 600, loaded=["lora-1", "lora-2", "lora-3"]):
        held += jobs
    return len(held) - before


def _complete(store: JobStore, held: list[Job]) -> int:
    return sum(store.complete(job.lease, [PICTURE], {"inference": 1}) for job in held)


def _through(store: JobStore, key: str, jobs: int, size: int) -> None:
    held: list[Job] = []
    _submit(store, key, jobs)
    _claim_all(store, size, held)
    _complete(store, held)


def fairness(store: JobStore, flood: str, small: str) -> dict[str, int]:
    """Queue a flood, then a few jobs of another key; tell after how many jobs of both the few were handed out."""
    _submit(store, flood, FLOOD)
    few = set(_submit(store, small, SMALL))
    order: list[str] = []
    while jobs := store.claim("bench", BATCH, 600):
        order += [job.id for job in jobs]
        _complete(store, jobs)
    return {"flood": FLOOD, "small": SMALL, "small_done_after": max(order.index(id) for id in few) + 1}


def wakes(url: str, store: JobStore, key: str) -> dict[str, float]:
    """How long after a commit an idle worker on another connection knows of it, in milliseconds."""
    engine = open_database(url)
    other, seconds = JobStore(engine), []
    for _ in range(WAKES):
        woken: list[float] = []
        thread = threading.Thread(target=_wait, args=(ChangeWatcher(other), woken))
        thread.start()
        time.sleep(random.uniform(0.05, 0.15))  # anywhere between two looks
        _submit(store, key, 1)
        committed = time.perf_counter()
        thread.join()
        seconds.append(max(0.0, woken[0] - committed))
    other.close()
    engine.dispose()
    return {
        "p50": round(statistics.median(seconds) * 1000, 1),
        "p90": round(statistics.quantiles(seconds, n=10)[-1] * 1000, 1),
    }


def _wait(watcher: ChangeWatcher, woken: list[float]) -> None:
    watcher.wait(10)
    woken.append(time.perf_counter())


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("", "", "jobs a second", "CPU ms: client", "server", "expected client", title="Store")
    for row in rows:
        for name, cost in row["costs"].items():
            expected = EXPECTED[row["database"]].get(name, "")
            table.add_row(row["database"], name, *(str(value) for value in cost.values()), str(expected))
        fair = row["fairness"]
        table.add_row(row["database"], f"small key behind {FLOOD}", f"done after {fair['small_done_after']} jobs")
        table.add_row(row["database"], "wake-up p50, p90", f"{row['wake_ms']['p50']}, {row['wake_ms']['p90']} ms")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
