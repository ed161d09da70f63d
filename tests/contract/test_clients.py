"""Clients of the hosted API as their registries have them: several generations, unmodified, over a real socket.

Each is installed once, outside of our own environment, and told nothing but our base URL and a key.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock
from PIL import Image

from .conftest import MODEL, Stack

CLIENTS = Path(__file__).parents[1] / "clients"
PYTHON_RELEASES = ("1.0.14", "0.1.2", "0.0.5")
NPM_RELEASES = ("wavespeed-0.3", "wavespeed-0.2", "wavespeed-0.0")
REQUEST = {"prompt": "a red fox on a blue background", "size": "512*768", "seed": 5, "num_images": 2}
COLOUR = (10, 200, 30)

needs_npm = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None,
    reason="needs node and npm; the Python clients go the same ways",
)


@pytest.fixture(scope="module", autouse=True)
def worker(stack: Stack) -> Iterator[None]:
    """Somebody draws."""
    with stack.worker():
        yield


@pytest.fixture(scope="session")
def npm_packages() -> Path:
    """The npm clients, installed from the lock file beside ``package.json`` if they are not there yet."""
    with FileLock(CLIENTS / ".npm.lock"):
        if not (CLIENTS / "node_modules" / ".package-lock.json").exists():
            run = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            subprocess.run(run, cwd=CLIENTS, check=True, capture_output=True, timeout=300)
    return CLIENTS / "node_modules"


@pytest.fixture(scope="session", params=PYTHON_RELEASES)
def python_release(request: pytest.FixtureRequest) -> Path:
    """A folder with one older release of ``wavespeed``; what it needs beside itself our environment has."""
    folder = CLIENTS / ".python" / request.param
    with FileLock(CLIENTS / ".python.lock"):
        if not folder.exists():
            wanted = ["--no-deps", "--target", str(folder), f"wavespeed=={request.param}"]
            run = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
            subprocess.run(run, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture
def start_picture(tmp_path: Path) -> Path:
    """A picture to upload."""
    path = tmp_path / "start.png"
    Image.new("RGB", (512, 768), COLOUR).save(path)
    return path


def told(command: list[str], stack: Stack, file: Path, **environment: str) -> dict[str, Any]:
    """Run a client to its end; return what it said."""
    asked = {"url": stack.url, "key": stack.key, "model": MODEL, "input": REQUEST, "file": str(file)}
    if command[0] == "node":
        asked["package"] = command.pop()
    done = subprocess.run(
        command,
        input=json.dumps(asked),
        cwd=CLIENTS,
        env={**os.environ, "NO_PROXY": "*", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def check(said: dict[str, Any]) -> None:
    """Pictures of the right size came, at once and later; what was wrong was said by its name."""
    for name in ("outputs", "sync"):
        if name in said:
            assert [picture(url).size for url in said[name]] == [(512, 768)] * 2, name
    assert "num_images" in said["refused"]["message"] or "HTTPStatusError" in said["refused"]["name"]
    if "failed" in said:
        assert "nobody" in said["failed"]["message"]
    if "edited" in said:
        drawn = picture(said["edited"][0]).convert("RGB").getpixel((400, 400))
        assert max(abs(a - b) for a, b in zip(drawn, COLOUR, strict=True)) < 8, "the uploaded picture was the start"


def picture(url: str) -> Image.Image:
    """What an output's address gives to anybody."""
    return Image.open(io.BytesIO(httpx.get(url, trust_env=False).raise_for_status().content))


def test_older_python_releases(stack: Stack, python_release: Path, start_picture: Path) -> None:
    """Submit, poll, sync, upload by that release's route, and errors that can be understood."""
    command = [sys.executable, "run_wavespeed.py"]
    check(told(command, stack, start_picture, PYTHONPATH=str(python_release)))


@needs_npm
@pytest.mark.parametrize("package", NPM_RELEASES)
def test_npm_releases(stack: Stack, npm_packages: Path, start_picture: Path, package: str) -> None:
    """The same for the JavaScript client."""
    check(told(["node", "run.mjs", package], stack, start_picture))


@needs_npm
def test_the_command_line_client(stack: Stack, npm_packages: Path, tmp_path: Path, start_picture: Path) -> None:
    """``wavespeed models | schema | balance | price | run | upload | history | show | delete`` all answer."""
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "WAVESPEED_API_KEY": stack.key}

    def cli(*arguments: str) -> Any:
        done = subprocess.run(
            ["node", str(npm_packages / "@wavespeed" / "cli" / "dist" / "cli.js"), *arguments],
            env={**os.environ, **environment, "HOME": str(tmp_path), "NO_PROXY": "*"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    cli("config", "--base-url", stack.url)
    assert MODEL in json.dumps(cli("models", "--json"))
    assert "num_inference_steps" in json.dumps(cli("schema", MODEL, "--json"))
    assert "balance" in cli("balance", "--json")
    cli("price", MODEL, "--input", "prompt=a fox", "--json")
    made = cli("run", MODEL, "-p", "a red fox", "-i", "size=512*512", "-i", "num_inference_steps=2", "--json")
    assert "http" in json.dumps(made)
    assert "http" in json.dumps(cli("upload", str(start_picture), "--json"))
    history = cli("history", "--json")
    newest = (history if isinstance(history, list) else history["items"])[0]["id"]
    assert cli("show", newest, "--json")["id"] == newest
    cli("delete", newest, "--yes", "--json")
    assert newest not in json.dumps(cli("history", "--json"))
