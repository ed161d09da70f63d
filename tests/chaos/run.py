"""One run: processes and clients are started, things are killed for a while, everything settles, and it is judged.

Knows what may be done to which process. Knows nothing of how clients or the verdict work.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from impasto.errors import Unavailable
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from tests.chaos.clients import Client
from tests.chaos.programs import IMPASTO, Postgres, Program, free_port, own_postgres
from tests.chaos.seen import Seen, receiver
from tests.chaos.verdict import Verdict, settled

LEASE_SECONDS = 2.0
MAX_ATTEMPTS = 1000  # no job of these is to blame for the death of its worker
SETTLE_SECONDS = 180.0  # for everything to end once the killing has stopped
GAP = (0.5, 1.5)  # seconds between two bad things
POSTGRES_SHARE = 0.1  # of what is done, where there is a PostgreSQL
STARTING_SHARE = 0.1  # of blows that fall though half of the processes of a kind are not at work
READY = {"api": "startup complete", "worker": "taking jobs"}
START_SECONDS = 60.0
LEAST_ACCEPTED = 10  # jobs; fewer prove little, so that a short run on a busy machine goes on
PATIENCE = 60.0  # seconds, at most
ACTS = ("kill", "kill", "kill", "stop", "term")


@dataclass
class Result:
    """What a run came to; ``wrong`` is empty if every promise was kept."""

    database: str
    seconds: float
    seed: int
    accepted: int
    lost: int
    double: int
    states: dict[str, int]
    attempts: int
    webhooks: int
    uploads: int
    done_to: dict[str, int]
    refused: dict[str, int]
    settled_after: float  # seconds
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """SIGKILLs, of processes of ours and of the database."""
        return sum(count for what, count in self.done_to.items() if what.startswith("kill"))


class Chaos:
    """The processes of one run.

    Args:
        database: ``sqlite`` or ``postgresql``.
        seed: Of everything that is drawn.
        folder: For files and logs; empty.
    """

    def __init__(
        self, database: str, seed: int, folder: Path, *, clients: int = 4, workers: int = 3, apis: int = 3
    ) -> None:
        self._database = database
        self._seed = seed
        self._folder = folder
        self._clients = clients
        self._workers = workers
        self._apis = apis
        self._chances = random.Random(seed)
        self._seen = Seen()
        self._programs: list[Program] = []
        self._timers: list[threading.Timer] = []
        self._postgres: Postgres | None = None

    def run(self, seconds: float, say: Callable[[str], object] = lambda words: None) -> Result:
        """Do it, from empty tables to the verdict."""
        with ExitStack() as stack:
            hook = stack.enter_context(receiver(self._seen, self._seed))
            self._postgres = stack.enter_context(own_postgres()) if self._database == "postgresql" else None
            url = self._postgres.url if self._postgres else f"sqlite:///{self._folder}/impasto.db"
            engine = open_database(url)
            stack.callback(engine.dispose)
            upgrade(engine)
            key = KeyStore(engine).create("chaos")
            bases = self._prepare(self._environment(url, hook))
            for program in self._programs:
                program.start()
                stack.callback(program.end)
            self._wait_until_at_work()
            clients = [
                Client(bases, key, hook, self._seen, self._seed * 1000 + number) for number in range(self._clients)
            ]
            for client in clients:
                client.start()
            say(f"{self._database}: {len(self._programs)} processes, {len(clients)} clients, {seconds:g} s")
            self._torment(time.monotonic() + seconds)
            for timer in self._timers:
                timer.join()
            for client in clients:
                client.stop()
            for client in clients:
                client.join()
            say(f"{len(self._seen.accepted)} jobs accepted; waiting for their ends")
            began = time.monotonic()
            while time.monotonic() < began + SETTLE_SECONDS and not self._settled(engine.url.render_as_string(False)):
                for program in self._programs:
                    program.start()
                time.sleep(0.2)
            took = time.monotonic() - began
            verdict = Verdict(engine, OutputStore(str(self._folder / "outputs")), self._seen)
            return self._result(seconds, took, verdict)

    def _environment(self, url: str, hook: str) -> dict[str, str]:
        return os.environ | {
            "IMPASTO_DATABASE_URL": url,
            "IMPASTO_DATA_DIR": str(self._folder),
            "IMPASTO_MODEL": "fake",
            "IMPASTO_LEASE_SECONDS": str(LEASE_SECONDS),
            "IMPASTO_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "IMPASTO_SAFETY_CHECKER": "none",
            "IMPASTO_SYNC_TIMEOUT": "15",
            "IMPASTO_WEBHOOK_ALLOW": "127.0.0.0/8",
            "IMPASTO_WEBHOOK_HTTP": "true",
            "IMPASTO_WEBHOOK_PORTS": hook.split(":")[2].strip("/"),
            "IMPASTO_WEBHOOK_PAUSE": "0.1",
            "IMPASTO_WEBHOOK_TRIES": "50",
            "OMP_NUM_THREADS": "1",
        }

    def _prepare(self, environment: dict[str, str]) -> list[str]:
        """Lay out the processes and return the addresses of the APIs; one of these has a worker of its own."""
        ports = [free_port() for _ in range(self._apis)]
        commands = {
            f"api-{number}": ["serve", "--workers", str(int(number == 0)), "--port", str(port)]
            for number, port in enumerate(ports)
        }
        commands |= {f"worker-{number}": ["worker"] for number in range(self._workers)}
        self._programs = [
            Program(
                name, [str(IMPASTO), *command], environment, self._folder / f"{name}.log", READY[name.split("-")[0]]
            )
            for name, command in commands.items()
        ]
        return [f"http://127.0.0.1:{port}" for port in ports]

    def _torment(self, until: float) -> None:
        """Do something bad about every second, as far as the machine is quick enough to have something at work."""
        latest = until + PATIENCE
        while (now := time.monotonic()) < until or (len(self._seen.accepted) < LEAST_ACCEPTED and now < latest):
            time.sleep(self._chances.uniform(*GAP))
            if self._postgres is not None and self._chances.random() < POSTGRES_SHARE:
                self._postgres.kill()
                self._seen.happened("kill -9 postgres")
                time.sleep(self._chances.uniform(0, 2))
                self._postgres.start()
                continue
            kind, early = self._chances.choice(list(READY)), self._chances.random() < STARTING_SHARE
            alike = [program for program in self._programs if program.kind == kind]
            at_work = [program for program in alike if program.at_work]
            if early or len(at_work) * 2 > len(alike):
                self._hurt(self._chances.choice(alike if early else at_work), self._chances.choice(ACTS))

    def _wait_until_at_work(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not all(program.at_work for program in self._programs):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the processes did not start; their logs are in {self._folder}")
            time.sleep(0.1)

    def _hurt(self, program: Program, act: str) -> None:
        """Kill, end or freeze a process, and let it come back."""
        if act == "stop" and program.kind == "worker":  # silent for longer than its lease, then back
            program.send(signal.SIGSTOP)
            self._later(LEASE_SECONDS * 2, lambda: program.send(signal.SIGCONT))
        else:
            program.send(signal.SIGTERM if act == "term" else signal.SIGKILL)
            self._later(self._chances.uniform(0, 0.5), program.start)
        words = {"stop": "SIGSTOP", "term": "SIGTERM", "kill": "kill -9"}
        what = words["kill" if act == "stop" and program.kind != "worker" else act]
        self._seen.happened(f"{what} {program.kind}")

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        self._timers.append(threading.Timer(seconds, act))
        self._timers[-1].start()

    def _settled(self, url: str) -> bool:
        engine = open_database(url)  # a connection of before may be of a server that is no more
        try:
            return settled(engine, self._seen)
        except Unavailable:
            return False
        finally:
            engine.dispose()

    def _result(self, seconds: float, took: float, verdict: Verdict) -> Result:
        seen = self._seen
        return Result(
            database=self._database,
            seconds=seconds,
            seed=self._seed,
            accepted=len(seen.accepted),
            lost=len(verdict.lost),
            double=len(verdict.double),
            states=dict(verdict.states),
            attempts=verdict.attempts,
            webhooks=sum(len(ids) for ids in seen.webhooks.values()),
            uploads=len(seen.uploads),
            done_to=dict(seen.done_to),
            refused=dict(seen.refused),
            settled_after=round(took, 1),
            wrong=verdict.wrong,
        )
