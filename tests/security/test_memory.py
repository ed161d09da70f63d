"""The memory of the server's process while fifty hostile requests come at once, read from the kernel."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import KEY, SDXL_LORA
from tests.e2e.conftest import serve as serve_process

served = serve_process
# Stated in docs/security-checks.md: bodies for 4 of the largest, each a few times over, and 50 million pixels
# while they are decoded and encoded anew.
BOUND_MB = 1200
REQUESTS = 50
# A refusal that comes while a client still sends can reach it as a reset.
ENDINGS = (b"HTTP/1.1 2", b"HTTP/1.1 4", b"HTTP/1.1 503", b"ConnectionResetError", b"BrokenPipeError")


def resident(pid: int, word: str = "VmRSS") -> int:
    """Memory of a process in MB; ``VmHWM`` is the most it ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(word))


def bomb(side: int = 7000) -> bytes:
    """A small PNG of 49 million pixels, which is within the limit and large when decoded."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def hostile(key: str) -> list[bytes]:
    """Whole requests, in turn: large bodies of text, of nothing, of nested lists, in pieces; and bombs."""
    limit = 32 * 2**20
    picture = base64.b64encode(bomb()).decode()
    bodies = [
        json.dumps({"prompt": "x" * (limit - 100)}).encode(),
        json.dumps({"prompt": "x", "image": "A" * (limit - 100)}).encode(),
        b"[" * (limit - 10),
        b'{"prompt": "x", "a": [' + b"{}," * (limit // 3 - 20) + b"{}]}",
        json.dumps({"prompt": "x", "image": picture, "mask_image": picture}).encode(),
        json.dumps({"prompt": "x", "image": picture}).encode(),
    ]
    head = f"POST {SDXL_LORA} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    whole = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    piece = b"x" * 2**20
    pieces = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for _ in range(31))
    return [*whole, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + pieces + b"0\r\n\r\n"]


def send(port: int, data: bytes, status: list[bytes]) -> None:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
            connection.sendall(data)
            status.append(connection.recv(100).split(b"\r\n")[0])
    except OSError as error:
        status.append(repr(error).encode())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_fifty_hostile_requests_stay_under_the_bound(served):
    """And the service answers meanwhile and afterwards. The control: the sum of what was sent is far over the bound."""
    process = served("--model", "fake", "--workers", "0")
    requests = hostile(process.wait_for(KEY))
    port, pid = int(process.url.rpartition(":")[2]), process.process.pid
    before, status = resident(pid), []
    sent = sum(len(requests[i % len(requests)]) for i in range(REQUESTS)) // 2**20
    assert sent * 3 > BOUND_MB  # bytes, text and objects: what they would take if they were all held
    threads = [threading.Thread(target=send, args=(port, requests[i % len(requests)], status)) for i in range(REQUESTS)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        slowest = max(slowest, httpx.get(f"{process.url}/health", timeout=60).elapsed.total_seconds())
        time.sleep(0.2)
    peak = resident(pid, "VmHWM")
    counted = {line.decode("latin-1"): status.count(line) for line in sorted(set(status))}
    print(f"before {before} MB, peak {peak} MB, after {resident(pid)} MB, slowest /health {slowest:.2f} s, {counted}")
    assert peak < BOUND_MB
    assert httpx.get(f"{process.url}/health").status_code == 200
    assert len(status) == REQUESTS
    assert all(line.startswith(ENDINGS) for line in status), counted
