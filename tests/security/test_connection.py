"""One connection: too much head, too slow a sender, and what a body may hold of the server."""

from __future__ import annotations

import socket
import time
import tracemalloc
from contextlib import AsyncExitStack

import anyio
import httpx
import pytest
from fastapi import Request

from impasto.api import protocol, room
from impasto.api.body import parse_object
from impasto.api.room import BodyRoom
from impasto.errors import InvalidInput, Unavailable
from tests.contract.conftest import MODEL
from tests.security.conftest import Raw

ENDLESS = 64 * 2**20  # more than the system keeps for a server that is slow to read, tcp_rmem's 32 MiB included


def test_an_endless_header_is_cut_off(raw):
    """One value, many values, an endless address, and trailers behind a body: 64 KiB, then 431; the control passes."""
    head = b"POST /api/v3/models HTTP/1.1\r\nHost: x\r\n"
    endless = {
        "value": (head + b"X-A: ", b"a" * 4096),
        "values": (head, b"X-A: b\r\n" * 512),
        "address": (b"GET /", b"a" * 4096),
        "trailers": (head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X-A: b\r\n" * 512),
    }
    for name, (start, more) in endless.items():
        connection, sent = raw(), 0
        connection.send(start)
        while sent < ENDLESS and connection.send(more):
            sent += len(more)
        answer = connection.rest()
        assert sent < ENDLESS, name
        assert not answer or b" 431 " in answer.split(b"\r\n")[0] or b" 401 " in answer.split(b"\r\n")[0], name
    control = raw()
    control.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-A: " + b"a" * 60_000 + b"\r\n\r\n")
    assert b"200 OK" in control.rest()


def test_a_head_that_drips_is_given_up(serve, monkeypatch):
    """Slow loris: a byte now and then does not keep a connection; others are answered meanwhile."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    with serve() as stack:
        silent, dripping = Raw(stack), Raw(stack)
        ends, began = time.monotonic() + 5, time.monotonic()
        while dripping.send(b"G") and time.monotonic() < ends:
            time.sleep(0.05)
            assert httpx.get(f"{stack.url}/health").status_code == 200
        assert time.monotonic() - began < 4
        assert b" 408 " in silent.rest()
        silent.socket.close()
        dripping.socket.close()


def test_a_body_that_stops_is_given_up_and_one_that_comes_slowly_is_not(serve, monkeypatch):
    """Silence ends it; a byte within the time does not."""
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.6)
    with serve() as stack:
        head = f"POST /api/v3/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.key}\r\n"
        slow, silent = Raw(stack), Raw(stack)
        body = b'{"prompt": "slow"}'
        for connection in (slow, silent):
            connection.send(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for byte in body:
            slow.send(bytes([byte]))
            time.sleep(0.1)
        assert b"200 OK" in slow.rest()
        assert b"200 OK" not in silent.rest()
        for connection in (slow, silent):
            connection.socket.close()


def test_a_long_wait_is_not_taken_for_a_slow_sender(serve, monkeypatch):
    """A request that was sent whole may wait for its answer as long as it likes."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.3)
    with serve(sync_timeout=1.5) as stack:
        answer = stack.client().post(f"/api/v3/{MODEL}", json={"prompt": "x", "enable_sync_mode": True})
        assert answer.json()["data"]["code"] == 5004


def test_past_the_number_of_connections_the_answer_is_503(serve):
    """And it is answered again when others have gone."""
    with serve(max_connections=10) as stack:
        held = [Raw(stack) for _ in range(12)]
        time.sleep(0.2)
        assert httpx.get(f"{stack.url}/health").status_code == 503
        for connection in held:
            connection.socket.close()
        ends = time.monotonic() + 5
        while httpx.get(f"{stack.url}/health").status_code != 200:
            assert time.monotonic() < ends
            time.sleep(0.05)


def test_nothing_but_http_is_spoken(stack):
    """An upgrade to WebSockets is not taken."""
    with socket.create_connection(("127.0.0.1", int(stack.url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert b"101" not in connection.recv(1000)


def asked(length: int | None) -> Request:
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return Request({"type": "http", "headers": headers})


def test_large_bodies_wait_their_turn_and_small_ones_do_not():
    """Four of the largest at once; the fifth when one has gone, in the order they came; a small one at once."""

    async def run() -> list[str]:
        bodies, order = BodyRoom(10 * room.SMALL), []
        gate = anyio.Event()

        async def hold(name: str, length: int | None) -> None:
            async with bodies.taken(asked(length)):
                order.append(name)
                await gate.wait()

        async with anyio.create_task_group() as group:
            for index in range(6):
                group.start_soon(hold, f"large {index}", None if index % 2 else 10 * room.SMALL)
                await anyio.sleep(0.01)
            group.start_soon(hold, "small", 1000)
            await anyio.sleep(0.05)
            assert order == ["large 0", "large 1", "large 2", "large 3", "small"]
            gate.set()
        return order

    assert anyio.run(run)[-2:] == ["large 4", "large 5"]


def test_who_waits_for_room_too_long_is_told_when_to_come_back(monkeypatch):
    """And who is cancelled leaves no hole: all the room comes back."""
    monkeypatch.setattr(room, "WAIT_SECONDS", 0.05)

    async def run() -> None:
        bodies = BodyRoom(10 * room.SMALL)
        async with AsyncExitStack() as held:
            for _ in range(4):
                await held.enter_async_context(bodies.taken(asked(None)))
            with pytest.raises(Unavailable, match="large requests") as told:
                async with bodies.taken(asked(None)):
                    raise AssertionError("there is no room")
            assert told.value.retry_after == 10
            with anyio.move_on_after(0.01):
                async with bodies.taken(asked(None)):
                    raise AssertionError("there is no room")
        assert bodies._free == 40 * room.SMALL
        assert not bodies._queue

    anyio.run(run)


def test_a_slow_upload_does_not_hold_others_up(stack):
    """Requests with small bodies are answered while large ones come in slowly."""
    head = f"POST /api/v3/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.key}\r\n"
    slow = [Raw(stack) for _ in range(8)]
    for connection in slow:
        connection.send(f"{head}Content-Length: {30 * 2**20}\r\n\r\n{{".encode())
    client, began = stack.client(), time.monotonic()
    for _ in range(10):
        assert client.post(f"/api/v3/{MODEL}", json={"prompt": "x"}).status_code == 200
    assert time.monotonic() - began < 10
    for connection in slow:
        connection.socket.close()


def test_a_body_of_countless_values_is_refused_unread():
    """Ten million empty objects would take a gigabyte; the control shows what a hundredth of them takes."""
    many, few = (b'{"a": [' + b"{}," * count + b"{}]}" for count in (10_000_000, 100_000))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match="commas"):
            parse_object(many)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        parse_object(few)
        assert tracemalloc.get_traced_memory()[1] > 6_000_000
    finally:
        tracemalloc.stop()
