"""A real ComfyUI and a real Impasto server, started for a while on loopback ports of their own.

Knows how each is started and how to tell that it is up. Knows nothing of workflows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

IMPASTO = str(Path(sys.executable).with_name("impasto"))
START_SECONDS = 240.0
LISTENING = re.compile(r"listening on (http://\S+)")
FOLDERS = ("custom_nodes", "models/checkpoints", "models/loras", "input", "output", "temp", "user")
TESTS = Path(__file__).parent


class Trouble(Exception):
    """Something is not as it should be; the message says what."""


@dataclass
class Program:
    """A process, and the file that its log goes to."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until it is up; say what its log says if it does not come up."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Trouble(f"{self.log.stem} did not start; the end of its log:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop it, by force if it takes too long."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Service:
    """An Impasto server with a key."""

    url: str
    key: str


@contextmanager
def impasto_server(folder: Path) -> Iterator[Service]:
    """Run ``impasto serve`` with the built-in model."""
    data = folder / "impasto-data"
    made = subprocess.run(
        [IMPASTO, "keys", "create", "comfyui", "--data-dir", str(data)], check=True, capture_output=True, text=True
    )
    with _running([IMPASTO, "serve", "--port", "0", "--data-dir", str(data)], folder / "impasto.log") as program:
        program.wait_for(lambda: LISTENING.search(program.log.read_text()) is not None)
        found = LISTENING.search(program.log.read_text())
        assert found
        yield Service(found[1], made.stdout.strip())


@contextmanager
def comfyui(source: Path, python: Path, base: Path, environment: Mapping[str, str]) -> Iterator[Program]:
    """Run ComfyUI on the CPU with everything that it writes below ``base``, and our pack installed there."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    if (example := source / "input" / "example.png").is_file():
        shutil.copy(example, base / "input")
    for prepare in sorted(TESTS.glob("prepare_*.py")):
        subprocess.run([str(python), str(prepare), str(base), str(source)], check=True)
    nodes = ["--custom-nodes", str(base / "custom_nodes")]
    subprocess.run([IMPASTO, "comfyui", "install", str(source), *nodes], check=True)
    port = _free_port()
    command = [str(python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
    command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base / 'comfyui.db'}"]
    command += ["--preview-method", "none"]  # previews are then ours alone
    with _running(command, base / "comfyui.log", source, environment) as program:
        program.url = f"http://127.0.0.1:{port}"
        program.wait_for(lambda: _answers(f"{program.url}/system_stats"))
        yield program


@contextmanager
def _running(
    command: list[str], log: Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Program]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("IMPASTO_")}
    own |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "NO_PROXY": "127.0.0.1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=own | dict(environment or {}))
        program = Program(process, log)
        try:
            yield program
        finally:
            program.stop()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def write_user_settings(base: Path, settings: Mapping[str, str]) -> None:
    """Write ComfyUI's settings, as its Settings dialog does."""
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(settings)))
