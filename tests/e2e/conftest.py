"""Real processes: ``impasto serve`` as an operator starts it, on a free loopback port, with a fresh data folder."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

IMPASTO = Path(sys.executable).with_name("impasto")
LISTENING = re.compile(r"listening on (http://\S+)")
KEY = re.compile(r"\b[0-9a-f]{64}\b")
START_SECONDS = 60.0
SDXL_LORA = "/api/v3/wavespeed-ai/sdxl-lora"


class Served:
    """A running service and its log."""

    def __init__(self, data_dir: Path, *options: str, **environment: str) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [IMPASTO, "serve", "--port", "0", "--data-dir", str(data_dir), *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.log: list[str] = []
        self._clients: list[httpx.Client] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(LISTENING)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)

    def wait_for(self, pattern: re.Pattern, seconds: float = START_SECONDS) -> str:
        """Return what the pattern finds in the log, waiting for it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if match := pattern.search("".join(self.log)):
                return match[match.re.groups and 1]
            assert self.process.poll() is None or self.log, "the service ended without a word"
            time.sleep(0.02)
        raise AssertionError(f"{pattern.pattern!r} is not in the log:\n{''.join(self.log)}")

    def api(self, key: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        self._clients.append(httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False))
        return self._clients[-1]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(10)
        self.process.stderr.close()
        for client in self._clients:
            client.close()


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., Served]]:
    """Start services that are stopped at the end of the test."""
    running: list[Served] = []

    def start(*options: str, data_dir: Path = tmp_path / "data", **environment: str) -> Served:
        running.append(Served(data_dir, *options, **environment))
        return running[-1]

    yield start
    for served in running:
        served.stop()


def poll(api: httpx.Client, job_id: str, until: Callable[[dict], bool], seconds: float = 90.0) -> dict:
    """Read a prediction until a condition holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        data = api.get(f"/api/v3/predictions/{job_id}/result").json()["data"]
        if until(data):
            return data
        time.sleep(0.05)
    raise AssertionError(f"still {data['status']} after {seconds} s: {data}")


def ended(data: dict) -> bool:
    return data["status"] in ("completed", "failed")


def worker_pids(parent: int) -> list[int]:
    """Process ids of a service's workers, read from /proc."""
    children = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for file in children for pid in file.read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own with room for a few pictures; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
