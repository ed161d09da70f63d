"""Does the API stay quick while it is busy? ``python -m benchmarks.api_load``.

The physics: one event loop answers everybody, and every millisecond that one answer holds the interpreter, all others
wait. 200 clients keep a job each and poll it as the real clients do, a worker draws all the while (patterns: its cost
here is encoding pictures and writing rows), and eight more connections read finished results of 2 MB of base64.

Server, worker and clients share the machine's cores with whatever else runs there, so a request is also late because a
core was not free. The kernel counts how long each thread stood ready without running. A sampler reads the counts, and
"unstarved" is a request's time less what it waited for a core on its way: in the clients' thread, in the server's loop,
and in the most starved of the server's other threads, one of which read the store for it. A request passes through
these one after the other, but two may wait at the same time, so ``at_most_ms`` is less the largest of the three alone.
The truth lies between. The processor time of the server (without its worker) for one answer needs no such care.

Prints a table, then one line of JSON, which is also written to ``benchmarks/results/api_load.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.api_clients import MODEL, Connection, Load, client, fetcher, finish
from benchmarks.loop_lag import FILE_VARIABLE, PERIOD, run_queue_seconds
from benchmarks.machine import ROOT, describe

RESULT = Path(__file__).parent / "results" / "api_load.json"
LARGE = {"prompt": "a large picture", "size": "1536*1536", "num_inference_steps": 2}
LARGE |= {"num_images": 2, "enable_base64_output": True}  # 2 MB of base64
SMALL = {"prompt": "a red fox", "size": "512*512", "num_inference_steps": 8}
STALL = 0.1  # seconds: the longest that the loop may be held
RAMP = 3.0  # seconds in which the clients start
SAMPLE = 0.02  # seconds between two looks at the kernel's counts


class Starvation:
    """How long threads have waited for a core, over time.

    Args:
        server: The process whose first thread runs the event loop.
        clients: Process and thread of the clients.
    """

    def __init__(self, server: int, clients: tuple[int, int]) -> None:
        self._server = server
        self._clients = clients
        self._times: list[float] = []
        self._waits: list[dict[tuple[int, int], float]] = []
        self._stop = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample in the background."""
        sampler = threading.Thread(target=self._sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            self._stop.set()
            sampler.join()

    def between(self, began: float, ended: float) -> list[float]:
        """Return the seconds that clients, event loop, and the most starved other thread waited within this time."""
        times = np.array(self._times)
        threads = self._waits[-1]
        grown = {}
        for thread in threads:
            near = slice(max(0, int(np.searchsorted(times, began)) - 1), int(np.searchsorted(times, ended)) + 1)
            waits = [sample.get(thread, 0.0) for sample in self._waits[near]]
            first, last = np.interp([began, ended], times[near], waits)
            grown[thread] = float(last - first)
        loop = grown.pop((self._server, self._server), 0.0)
        return [grown.pop(self._clients, 0.0), loop, max(grown.values(), default=0.0)]

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE):
            threads = [(self._server, int(name)) for name in os.listdir(f"/proc/{self._server}/task")]
            waits = {thread: run_queue_seconds(*thread) for thread in [self._clients, *threads]}
            self._times.append(time.monotonic())
            self._waits.append(waits)


def main() -> None:
    """Start the service, load it, report."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder, service(Path(folder), options.step) as (port, key, process):
        load = Load("127.0.0.1", port, key)
        starvation = Starvation(process, (os.getpid(), threading.get_native_id()))
        with starvation.watched():
            began, ended, used = asyncio.run(run(load, options, process))
        asyncio.run(finish(load, list(load.jobs), 300))
        lags_file = Path(folder) / "lags.json"
        _stop(process, lags_file)
        lags = [lag for lag in json.loads(lags_file.read_text()) if began <= lag[0] <= ended]
    asked = [r for r in load.requests if r.kind != "drain"]
    result = {
        "benchmark": "api_load",
        "clients": options.clients,
        "seconds": options.seconds,
        "poll_every": options.pause,
        "requests": summary(load, starvation, ended - began),
        "server_cpu_share": round(used / (ended - began), 2),
        "cpu_ms_per_request": round(1000 * used / len(asked), 2),
        "statuses": {str(status): count for status, count in Counter(r.status for r in load.requests).items()},
        "broken_connections": load.broken,
        "jobs": dict(Counter(load.jobs.values())),
        "loop": loop_summary(lags, starvation),
        "machine": describe(),
    }
    report(result)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


async def run(load: Load, options: argparse.Namespace, process: int) -> tuple[float, float, float]:
    """Make the large results, then load the service; return when that began and ended, and the server's CPU time."""
    connection = Connection(load)
    large = [json.loads(await connection.ask("first", "POST", MODEL, LARGE))["data"]["id"] for _ in range(4)]
    connection.close()
    await finish(load, large, 60)
    load.requests.clear()
    began, used = time.monotonic(), cpu_seconds(process)
    until = began + options.seconds
    async with asyncio.TaskGroup() as group:
        for number in range(options.clients):
            group.create_task(_later(number * RAMP / options.clients, load, until, options.pause))
        for _ in range(options.fetchers):
            group.create_task(fetcher(load, until, 0.25, large))
    return began, time.monotonic(), cpu_seconds(process) - used


def cpu_seconds(process: int) -> float:
    """Return the processor time that a process has used, without its children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _later(seconds: float, load: Load, until: float, pause: float) -> None:
    """Start a client after some time, so that their polls are spread as those of real clients are."""
    await asyncio.sleep(seconds)
    await client(load, until, pause, SMALL)


@contextmanager
def service(folder: Path, step: float) -> Iterator[tuple[int, str, int]]:
    """Start the probed service; yield its port, a key and its process."""
    settings = {"MODEL": "fake", "PORT": "0", "DATA_DIR": str(folder / "data"), "FAKE_STEP_SECONDS": str(step)}
    environment = os.environ | {f"IMPASTO_{name}": value for name, value in settings.items()}
    environment |= {FILE_VARIABLE: str(folder / "lags.json"), "OMP_NUM_THREADS": "1"}
    log = folder / "serve.log"
    with log.open("w") as stream:
        started = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.loop_lag"], cwd=ROOT, env=environment, stderr=stream, stdout=stream
        )
    try:
        for _ in range(300):
            found = re.search(r"on http://[\d.]+:(\d+).*?once\): (\w+).*?loaded; taking jobs", log.read_text(), re.S)
            if found:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"the service did not start:\n{log.read_text()}")
        yield int(found[1]), found[2], started.pid
    finally:
        started.terminate()
        started.wait(30)


def _stop(process: int, lags: Path) -> None:
    os.kill(process, 15)
    for _ in range(200):
        if lags.exists() and lags.read_text().endswith("]"):
            return
        time.sleep(0.1)
    raise RuntimeError("the service wrote no samples when it was stopped")


def percentile(values: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed, in milliseconds."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1000, 1)


def summary(load: Load, starvation: Starvation, seconds: float) -> dict[str, Any]:
    """Return counts and percentiles of each kind of request, as they were and unstarved."""
    rows: dict[str, Any] = {}
    for kind in ("submit", "poll", "fetch"):
        timed = [r for r in load.requests if r.kind == kind]
        raw = [r.seconds for r in timed]
        waits = [starvation.between(r.began, r.ended) for r in timed]
        fair = [max(0.0, r.seconds - sum(wait)) for r, wait in zip(timed, waits, strict=True)]
        most = [max(0.0, r.seconds - max(wait)) for r, wait in zip(timed, waits, strict=True)]
        rows[kind] = {"count": len(timed), "per_second": round(len(timed) / seconds, 1)}
        rows[kind] |= {"bytes": max((r.size for r in timed), default=0)}
        for name, values in (("ms", raw), ("unstarved_ms", fair), ("at_most_ms", most)):
            rows[kind][name] = {f"p{p}": percentile(values, p / 100) for p in (50, 95, 99, 100)} if values else {}
    return rows


def loop_summary(lags: list[list[float]], starvation: Starvation) -> dict[str, Any]:
    """Return how late the loop's timers were, and how much of that was not the wait for a core.

    The loop also waits for a thread that holds the interpreter's lock and has no core.
    """
    raw = [lag for _, lag, _ in lags]
    fair = [max(0.0, lag - starved) for _, lag, starved in lags]
    for number, (now, lag, _) in enumerate(lags):
        if lag > SAMPLE:
            fair[number] = max(0.0, lag - sum(starvation.between(now - lag - PERIOD, now)[1:]))
    shown: dict[str, Any] = {"samples": len(lags)}
    for name, values in (("lag_ms", raw), ("unstarved_lag_ms", fair)):
        shown[name] = {f"p{p}": percentile(values, p / 100) for p in (50, 95, 99, 100)}
    return shown | {"stalls": sum(lag > STALL for lag in raw), "unstarved_stalls": sum(lag > STALL for lag in fair)}


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    title = f"{result['clients']} clients, polling every {result['poll_every']:g} s, for {result['seconds']:g} s"
    table = Table("", "count", "per s", "p50", "p95", "p99", "longest", "unstarved p99", "longest, ms", title=title)
    for kind, row in result["requests"].items():
        raw, fair = row["ms"], row["unstarved_ms"]
        if raw:
            times = [f"{raw[p]:.1f}" for p in ("p50", "p95", "p99", "p100")]
            fairs = [f"{fair[p]:.1f}" for p in ("p99", "p100")]
            table.add_row(kind, str(row["count"]), f"{row['per_second']:.0f}", *times, *fairs)
    loop = result["loop"]
    raw, fair = loop["lag_ms"], loop["unstarved_lag_ms"]
    times = [f"{raw[p]:.1f}" for p in ("p50", "p95", "p99", "p100")]
    table.add_row("event loop", str(loop["samples"]), "", *times, f"{fair['p99']:.1f}", f"{fair['p100']:.1f}")
    console = Console(file=sys.stdout, width=120)
    console.print(table)
    console.print(
        f"server {result['server_cpu_share']} cores, {result['cpu_ms_per_request']} ms of processor an answer"
    )
    console.print(f"statuses {result['statuses']}, broken {result['broken_connections']}, jobs {result['jobs']}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two polls of a client")
    parser.add_argument("--fetchers", type=int, default=8, help="connections that read results of 2 MB")
    parser.add_argument("--step", type=float, default=0.02, help="seconds of a step of the fake model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
