"""A real S3 server for the tests, as a process of its own that can be stopped: moto's.

Knows how to start it and what clients must be told. Its objects live in its memory and end with it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.chaos.programs import free_port

BUCKET = "pictures"
START_SECONDS = 60.0


class S3:
    """One server, on the same port after each start."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"s3://{BUCKET}/prefix"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead clients here."""
        return {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it with an empty bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx.put(f"http://127.0.0.1:{self.port}/{BUCKET}", timeout=10, trust_env=False).raise_for_status()
                return
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def stop(self) -> None:
        """Kill it, with everything in it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def names(self) -> list[str]:
        """What is in the bucket, whole names."""
        listing = httpx.get(f"http://127.0.0.1:{self.port}/{BUCKET}?list-type=2", timeout=10, trust_env=False).text
        return [part.partition("</Key>")[0] for part in listing.split("<Key>")[1:]]


@contextmanager
def s3_server() -> Iterator[S3]:
    """A server for the length of a block."""
    server = S3()
    try:
        yield server
    finally:
        server.stop()
