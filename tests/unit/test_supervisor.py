"""The supervisor: real worker processes, killed and hopeless."""

import itertools
import os
import signal
import threading
import time

import pytest

from impasto.config import Settings
from impasto.jobs.database import open_database
from impasto.worker import pulse
from impasto.worker import supervisor as module
from impasto.worker.supervisor import Supervisor

SECONDS = 60.0


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    return Settings.load(overrides={"data_dir": tmp_path, "model": "fake"})


def wait_for(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_worker_is_replaced_even_if_its_death_cannot_be_noted(settings):
    """The note is a kindness; the restart is the promise."""
    deaths = []

    def note(name):
        deaths.append(name)
        raise RuntimeError("the store is away")

    supervisor = Supervisor(settings, on_death=note, on_hopeless=lambda: deaths.append("hopeless"))
    supervisor.start()
    try:
        wait_for(lambda: supervisor._process is not None)
        first = supervisor._process
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: supervisor._process is not first)
        assert supervisor._process.poll() is None
        assert len(deaths) == 1
    finally:
        supervisor.stop()
    assert supervisor._process.poll() is not None


def test_a_frozen_worker_is_replaced(settings, monkeypatch):
    """Stopped as a whole, it can not notice that itself: its supervisor hears no pulse and starts another."""
    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 3.0)
    monkeypatch.setattr(module, "LISTEN_SECONDS", 0.1)
    deaths = []
    supervisor = Supervisor(settings, on_death=deaths.append, on_hopeless=pytest.fail)
    supervisor.start()
    try:
        wait_for(lambda: (settings.data_dir / "impasto.db").exists())
        first = supervisor._process
        os.kill(first.pid, signal.SIGSTOP)
        wait_for(lambda: supervisor._process is not first)
        assert first.returncode == -signal.SIGKILL
        assert len(deaths) == 1
    finally:
        supervisor.stop()
    assert supervisor._process.returncode != -signal.SIGKILL, "the living one was left alone"


def test_the_pauses_between_restarts_grow(settings, monkeypatch):
    """A worker that dies at once is not started a hundred times a second."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(module, "LAST_PAUSE", 0.4)
    starts = []

    def dies_at_once(self, name):
        starts.append(time.monotonic())
        return 1

    monkeypatch.setattr(Supervisor, "_run_once", dies_at_once)
    supervisor = Supervisor(settings, on_death=lambda name: None, on_hopeless=pytest.fail)
    supervisor.start()
    wait_for(lambda: len(starts) >= 5)
    supervisor._stopping.set()
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)][:4]
    assert all(gap >= least for gap, least in zip(gaps, [0.1, 0.2, 0.4, 0.4], strict=True))


def test_a_worker_that_is_told_to_stop_ends_cleanly(settings):
    """Exit status 0, and no other worker is started."""
    supervisor = Supervisor(settings, on_death=pytest.fail, on_hopeless=pytest.fail)
    supervisor.start()
    wait_for(lambda: (settings.data_dir / "impasto.db").exists())
    time.sleep(1)  # long enough to be in its loop
    supervisor.stop()
    assert supervisor._process.returncode == 0
    open_database(settings.database).dispose()


def test_settings_that_cannot_work_are_not_tried_again(settings):
    """A model that is not there: told once, nothing restarted."""
    hopeless = threading.Event()
    bad = settings.model_copy(update={"model": "nowhere"})
    supervisor = Supervisor(bad, on_death=pytest.fail, on_hopeless=hopeless.set)
    supervisor.start()
    assert hopeless.wait(SECONDS)
    supervisor.stop()
