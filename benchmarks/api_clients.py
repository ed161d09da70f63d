"""Two hundred clients of the HTTP service, as they are in the field: each submits, polls to the end, submits again.

Knows HTTP/1.1 on a kept-open connection and how to time a request. Knows nothing of the server beyond its wire. The
clients are one thread, written close to the socket, so that they take little of the two cores that the server needs.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "/api/v3/wavespeed-ai/sdxl-lora"
ENDED = ("completed", "failed")
JITTER = 0.2  # clients on many machines do not tick together: in step, all would wait for the last of two hundred


@dataclass(frozen=True, slots=True)
class Timed:
    """One request."""

    kind: str  # submit, poll, fetch
    began: float  # by time.monotonic
    ended: float
    status: int
    size: int  # bytes of the body

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass
class Load:
    """What was asked of the service, and what came back."""

    host: str
    port: int
    key: str
    requests: list[Timed] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # id to the last known status
    broken: int = 0  # connections that ended without an answer

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a connection that breaks."""
        try:
            yield
        except (OSError, EOFError, asyncio.IncompleteReadError):
            self.broken += 1


class Connection:
    """One connection of one client."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, kind: str, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Send a request and return the answer's body; its time is noted."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._load.host, self._load.port, limit=2**22)
        reader, writer = self._streams
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._load.host}:{self._load.port}\r\n"
        head += f"Authorization: Bearer {self._load.key}\r\nContent-Length: {len(data)}\r\n\r\n"
        began = time.monotonic()
        writer.write(head.encode() + data)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        answer = await reader.readexactly(length)
        status = int(lines[0].split()[1])
        self._load.requests.append(Timed(kind, began, time.monotonic(), status, length))
        return answer

    def close(self) -> None:
        """Hang up."""
        if self._streams:
            self._streams[1].close()


async def client(load: Load, until: float, pause: float, body: dict[str, Any]) -> None:
    """Submit, poll about every ``pause`` seconds to the job's end, and again, until the time is over."""
    connection = Connection(load)
    with load.counting():
        while time.monotonic() < until:
            answer = json.loads(await connection.ask("submit", "POST", MODEL, body))
            if "data" not in answer:
                await asyncio.sleep(pause)
                continue
            job = answer["data"]["id"]
            load.jobs[job] = "created"
            while load.jobs[job] not in ENDED and time.monotonic() < until:
                await asyncio.sleep(pause * random.uniform(1 - JITTER, 1 + JITTER))
                polled = json.loads(await connection.ask("poll", "GET", f"/api/v3/predictions/{job}/result"))
                load.jobs[job] = polled["data"]["status"] if "data" in polled else load.jobs[job]
    connection.close()


async def fetcher(load: Load, until: float, pause: float, jobs: list[str]) -> None:
    """Read large finished results again and again, with a pause after each."""
    connection = Connection(load)
    with load.counting():
        while time.monotonic() < until:
            for job in jobs:
                await connection.ask("fetch", "GET", f"/api/v3/predictions/{job}/result")
                await asyncio.sleep(pause)
    connection.close()


async def finish(load: Load, jobs: list[str], seconds: float) -> None:
    """Poll jobs gently to their ends, or until the time is over."""
    connection, until = Connection(load), time.monotonic() + seconds
    with load.counting():
        for job in jobs:
            while load.jobs.setdefault(job, "created") not in ENDED and time.monotonic() < until:
                polled = json.loads(await connection.ask("drain", "GET", f"/api/v3/predictions/{job}/result"))
                load.jobs[job] = polled["data"]["status"] if "data" in polled else "failed"
                if load.jobs[job] not in ENDED:
                    await asyncio.sleep(0.2)
    connection.close()
