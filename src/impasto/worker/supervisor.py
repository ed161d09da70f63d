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
from impasto.worker.naming import EXIT_CONFIG, new_name
from impasto.worker.pulse import Pulse

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds before the first restart; doubles up to LAST_PAUSE
LAST_PAUSE = 30.0
HEALTHY_AFTER = 60.0  # seconds of life after which the pauses start small again
STOP_GRACE = 30.0  # seconds for the step in progress, beside those for draining, before the process is killed
LISTEN_SECONDS = 5.0  # between looks whether the process is frozen; its end is seen at once


class Supervisor:
    """One worker process, kept running on a thread of its own.

    Args:
        settings: Handed to the process through its environment.
        on_death: Called with the worker's name after each unexpected end, so that its leases can end at once.
        on_hopeless: Called when the worker cannot run with these settings; it is not started again.
    """

    def __init__(
        self, settings: Settings, on_death: Callable[[str], object], on_hopeless: Callable[[], object]
    ) -> None:
        self._settings = settings
        self._grace = STOP_GRACE + settings.drain_seconds
        self._on_death = on_death
        self._on_hopeless = on_hopeless
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

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
                process.wait(self._grace)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join(STOP_GRACE)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            started = time.monotonic()
            name = new_name()
            try:
                status = self._run_once(name)
            except OSError as error:  # no more processes or memory, for now
                log.error("the worker could not be started: %s", error)
                status = -1
            if self._stopping.is_set():
                return
            if status == EXIT_CONFIG:
                log.error("the worker cannot run with these settings")
                self._on_hopeless()
                return
            self._report_death(name)
            if time.monotonic() - started > HEALTHY_AFTER:
                pause = FIRST_PAUSE
            log.warning("worker %s ended with status %d; starting another in %.1f s", name, status, pause)
            self._stopping.wait(pause)
            pause = min(pause * 2, LAST_PAUSE)

    def _report_death(self, name: str) -> None:
        try:
            self._on_death(name)
        except Exception:  # its leases run out by themselves
            log.exception("the end of worker %s could not be noted", name)

    def _run_once(self, name: str) -> int:
        # The open pipe on standard input tells the worker that we are alive; it ends when the pipe closes.
        # A session of its own keeps the terminal's Ctrl-C from it: we decide when it ends.
        pulse = Pulse()
        with subprocess.Popen(
            [sys.executable, "-m", "impasto.worker.process", name, str(pulse.theirs)],
            stdin=subprocess.PIPE,
            env={**os.environ, **self._settings.to_environment()},
            start_new_session=True,
            pass_fds=[pulse.theirs],
        ) as process:
            pulse.close_theirs()
            self._process = process
            if self._stopping.is_set():  # stop() ran before there was a process to end
                process.terminate()
            try:
                return self._watched(process, pulse, name)
            finally:
                pulse.close()

    def _watched(self, process: subprocess.Popen[bytes], pulse: Pulse, name: str) -> int:
        """Wait for the process to end, and end it if it is frozen."""
        while process.poll() is None:
            if pulse.silent(LISTEN_SECONDS) and not self._stopping.is_set():
                log.error("worker %s shows no sign of life; ending it", name)
                process.kill()
                return process.wait()
            if pulse.ended:
                return process.wait()
        return process.wait()
