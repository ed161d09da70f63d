"""Keeps a worker process alive: starts it, starts it again with growing pauses, stops it.

Knows processes. Knows no jobs and no torch: a worker that dies loses nothing, its leases run out.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from impasto.config import Settings
from impasto.worker.loop import new_name

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds before the first restart; doubles up to LAST_PAUSE
LAST_PAUSE = 30.0
HEALTHY_AFTER = 60.0  # seconds of life after which the pauses start small again
STOP_GRACE = 30.0  # seconds for the step in progress before the process is killed


class Supervisor:
    """One worker process, kept running on a thread of its own.

    Args:
        settings: Handed to the process through its environment.
        on_death: Called with the worker's name after each unexpected end, so that its leases can end at once.
    """

    def __init__(self, settings: Settings, on_death: Callable[[str], object] | None = None) -> None:
        self._settings = settings
        self._on_death = on_death
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the worker now running, if one is."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the worker and keep it running."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the worker to hand back its jobs and end; kill it if it takes too long."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join(STOP_GRACE)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            started = time.monotonic()
            name = new_name()
            status = self._run_once(name)
            if self._stopping.is_set():
                return
            if time.monotonic() - started > HEALTHY_AFTER:
                pause = FIRST_PAUSE
            log.warning("worker %s ended with status %d; starting another in %.1f s", name, status, pause)
            if self._on_death is not None:
                self._on_death(name)
            self._stopping.wait(pause)
            pause = min(pause * 2, LAST_PAUSE)

    def _run_once(self, name: str) -> int:
        # The open pipe on standard input tells the worker that we are alive; it ends when the pipe closes.
        with subprocess.Popen(
            [sys.executable, "-m", "impasto.worker.process", name],
            stdin=subprocess.PIPE,
            env={**os.environ, **self._settings.to_environment()},
        ) as process:
            self._process = process
            if self._stopping.is_set():  # stop() ran before there was a process to end
                process.terminate()
            return process.wait()
