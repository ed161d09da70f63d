"""A real server on a loopback port, a store in a temporary folder, and two ways to get the work done.

By hand (``claim``, ``complete``), where a test must hold a job in some state; or by the real worker loop with a
backend that draws patterns. No model is loaded.
"""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from impasto.api.app import create_app
from impasto.api.server import Server, server_config
from impasto.config import Settings
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Job, Lease, Output
from impasto.jobs.store import JobStore
from impasto.worker.backend import Backend, FakeBackend
from impasto.worker.loop import WorkerLoop

MODEL = "wavespeed-ai/sdxl-lora"
_NAMES = count()


def picture(width: int, height: int, seed: int, kind: str = "png") -> bytes:
    """A flat picture whose colour tells the seed."""
    data = io.BytesIO()
    Image.new("RGB", (width, height), (seed % 256, seed // 256 % 256, 99)).save(data, kind)
    return data.getvalue()


@dataclass
class Stack:
    """A running service and the hands of its worker."""

    settings: Settings
    store: JobStore
    keys: KeyStore
    outputs: OutputStore
    url: str
    key: str
    app: Any
    server: Server
    clients: list[httpx.Client] = field(default_factory=list)

    def client(self, key: str | None = None, **headers: str) -> httpx.Client:
        """An HTTP client with a key, the first one if none is given; ``""`` sends no key."""
        key = self.key if key is None else key
        signed = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.Client(base_url=self.url, headers=signed | headers, trust_env=False, timeout=30)
        self.clients.append(client)
        return client

    def new_key(self) -> str:
        """The secret of one more key."""
        return self.keys.create(f"key-{next(_NAMES)}")

    def claim(self) -> list[Job]:
        """Take everything that waits, as a worker."""
        return self.store.claim("test-worker", 1000, 60.0)

    def complete(self, job: Job, nsfw: bool = False) -> None:
        """Deliver a job's pictures."""
        request, kind = job.input["request"], job.input["output"]["format"]
        done = []
        for index in range(request["num_images"]):
            seed = job.seed + index
            data = picture(request["width"], request["height"], seed, kind)
            blob = self.outputs.put(job.id, job.attempt, index, data, f"image/{kind}")
            done.append(Output(blob, f"image/{kind}", request["width"], request["height"], nsfw, seed))
        assert self.store.complete(Lease(job.id, job.attempt), done, {"inference": 1234})

    def work_off(self) -> None:
        """Finish everything that waits."""
        for job in self.claim():
            self.complete(job)

    @contextmanager
    def worker(self, backend: Backend | None = None, **options: Any) -> Iterator[None]:
        """Finish everything that comes, in the background, with the real loop and a backend that draws patterns."""
        backend = backend or FakeBackend(step_seconds=0.001)
        loop = WorkerLoop(self.store, self.outputs, backend, name="fake", lora_dir=self.settings.lora_dir, **options)
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield
        finally:
            loop.stop()
            thread.join(10)


@contextmanager
def serving(folder: Path, **overrides: Any) -> Iterator[Stack]:
    """Run the service on a free port with its own store."""
    settings = Settings(data_dir=folder, **overrides)
    engine = open_database(settings.database)
    upgrade(engine)
    store, keys, outputs = JobStore(engine), KeyStore(engine), OutputStore(str(folder / "outputs"))
    app = create_app(settings, store, keys, outputs)
    config = server_config(app, settings)
    config.timeout_graceful_shutdown = 2
    server = Server(app, config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            thread.join(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        stack = Stack(settings, store, keys, outputs, url, keys.create("first"), app, server)
        try:
            yield stack
        finally:
            for client in stack.clients:
                client.close()
            server.should_exit = True
            thread.join(10)
            store.close()
            engine.dispose()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One service for all tests of a file, without a worker: tests do its work by hand."""
    with serving(tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., AbstractContextManager[Stack]]:
    """Start another service, with settings of its own."""
    return lambda **overrides: serving(tmp_path / "data", **overrides)


@pytest.fixture(scope="module")
def http(stack: Stack) -> httpx.Client:
    """A client with a good key."""
    return stack.client()


def submit(client: httpx.Client, model: str = MODEL, version: str = "v3", **body: Any) -> dict[str, Any]:
    """Submit a request that must be taken; return the prediction."""
    answer = client.post(f"/api/{version}/{model}", json={"prompt": "a red fox", "size": "512*512"} | body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["code"] == 200
    return answer.json()["data"]


def read(client: httpx.Client, prediction: dict[str, Any]) -> dict[str, Any]:
    """Read a prediction again, at the URL it names."""
    answer = client.get(prediction["urls"]["get"])
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def refusal(answer: httpx.Response, status: int) -> str:
    """Check that an answer is an error body as every client understands it; return its message."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"code", "message", "error"}
    assert body["code"] == status
    assert body["message"] == body["error"] != ""
    return str(body["message"])
