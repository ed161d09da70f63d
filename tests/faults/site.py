"""A small installation for one test: a database, a folder, and API and worker processes that may be made to die.

Knows how to start processes, with or without a fault, and how to read what they left in the database.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from sqlalchemy import Row, text

from impasto.jobs.database import open_database, reading, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.records import Job
from impasto.jobs.states import TERMINAL
from impasto.jobs.store import JobStore
from tests.chaos.programs import IMPASTO, Program, free_port

SDXL_LORA = "/api/v3/wavespeed-ai/sdxl-lora"
SMALL = {"prompt": "a red fox", "size": "512*512", "seed": 7, "num_inference_steps": 4}
SECONDS = 90.0  # for anything that must happen
LEASE_SECONDS = 1.5


class Site:
    """Ends everything that it started."""

    def __init__(self, url: str, folder: Path, storage: str | None = None, **environment: str) -> None:
        self.engine = open_database(url)
        upgrade(self.engine)
        self.store = JobStore(self.engine)
        self.key = KeyStore(self.engine).create("test")
        self.storage = storage or str(folder / "outputs")
        self._folder = folder
        self.programs: list[Program] = []
        self._clients: list[httpx.Client] = []
        self._environment = os.environ | {
            "IMPASTO_DATABASE_URL": url,
            "IMPASTO_STORAGE_URL": self.storage,
            "IMPASTO_DATA_DIR": str(folder),
            "IMPASTO_MODEL": "fake",
            "IMPASTO_LEASE_SECONDS": str(LEASE_SECONDS),
            "IMPASTO_SAFETY_CHECKER": "none",
            "PYTHONPATH": os.getcwd(),
            **environment,
        }

    def api(self, fault: str = "") -> httpx.Client:
        """Start an API without workers, and return a client of it once it answers."""
        port = free_port()
        command = ["serve", "--workers", "0", "--port", str(port)]
        self._start("api", "tests.faults.api", fault, command, "startup complete")
        headers = {"Authorization": f"Bearer {self.key}"}
        self._clients.append(
            httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False)
        )
        return self._clients[-1]

    def worker(self, fault: str = "") -> Program:
        """Start a worker and return it once it takes jobs."""
        return self._start("worker", "tests.faults.worker", fault, ["worker"], "taking jobs")

    def _start(self, kind: str, module: str, fault: str, command: list[str], ready: str) -> Program:
        name = f"{kind}-{len(self.programs)}"
        command = [sys.executable, "-m", module, fault, *command] if fault else [str(IMPASTO), *command]
        program = Program(name, command, dict(self._environment), self._folder / f"{name}.log", ready)
        self.programs.append(program)
        program.start()
        self.wait(lambda: program.at_work or not program.runs)
        assert program.runs, program.log.read_text()
        return program

    def submit(self, api: httpx.Client, **fields: object) -> str:
        """Submit a job and return its id."""
        answer = api.post(SDXL_LORA, json=SMALL | fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"]["id"])

    def wait(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def ended(self, job_id: str) -> Job:
        """The job once it has ended."""
        self.wait(lambda: self.store.get(job_id).status in TERMINAL)
        return self.store.get(job_id)

    def attempts(self, job_id: str) -> list[str | None]:
        """How each attempt at a job ended, in order."""
        statement = "select outcome from attempts where prediction_id = :id order by attempt"
        return [row.outcome for row in self.rows(statement, id=job_id)]

    def ends(self, job_id: str) -> list[str]:
        """The events that end a job: one, if all is well."""
        statement = "select type from events where prediction_id = :id"
        return [row.type for row in self.rows(statement, id=job_id) if row.type in TERMINAL]

    def rows(self, statement: str, **values: object) -> list[Row]:
        """What a statement gives."""
        with reading(self.engine) as db:
            return list(db.execute(text(statement), values).all())

    def logs(self) -> str:
        """The end of each process's log."""
        return "\n".join(f"{p.name}:\n{p.log.read_text()[-1500:]}" for p in self.programs)

    def close(self) -> None:
        """End everything."""
        for program in self.programs:
            program.end()
        for client in self._clients:
            client.close()
        self.store.close()
        self.engine.dispose()
