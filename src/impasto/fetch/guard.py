"""Dialling only what may be dialled: a network backend that resolves once, checks every answer, and dials that answer.

Knows sockets and the policy. Knows no HTTP. The name is resolved here and nowhere else, and the number that was
checked is the number that is dialled, so a name that changes its answer between the two gains nothing.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import httpcore

from impasto.fetch.addresses import Address, Policy, parse_address
from impasto.fetch.failure import FetchFailed, unreachable

CONNECT_SECONDS: Final = 10.0  # for name and connection together
SLICE_SECONDS: Final = 0.5  # between looks at whether anybody still waits

Resolver = Callable[[str, int], list[str]]  # host, port -> numeric addresses
Stop = Callable[[], bool]


def never() -> bool:
    """Nobody gives up."""
    return False


class Clock:
    """How long a fetch may go on.

    Args:
        seconds: From now, for everything together.
        stop: Says when nobody waits any more.
    """

    def __init__(self, seconds: float, stop: Stop = never) -> None:
        self._ends = time.monotonic() + seconds
        self._stop = stop

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            FetchFailed: None are, or nobody waits.
        """
        if self._stop():
            raise FetchFailed("stopped", "is not waited for any more")
        left = self._ends - time.monotonic()
        if left <= 0:
            raise FetchFailed("slow", "did not arrive in time: try again, or give a faster address")
        return left


def resolve(host: str, port: int) -> list[str]:
    """Ask the system's resolver."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class PinnedBackend(httpcore.NetworkBackend):
    """Connections for one fetch.

    Args:
        policy: What may be dialled.
        clock: The fetch's time.
        resolver: Turns names into addresses.
    """

    def __init__(self, policy: Policy, clock: Clock, resolver: Resolver = resolve) -> None:
        self._policy = policy
        self._clock = clock
        self._resolver = resolver
        self._dialler = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Dial one of the addresses of ``host``, all of which must be permitted.

        Raises:
            FetchFailed: Not permitted or nobody answers; the two cannot be told apart.
        """
        ends = time.monotonic() + min(CONNECT_SECONDS, self._clock.left())
        for address in self._checked(host, port, ends - time.monotonic()):
            left = ends - time.monotonic()
            if left <= 0:
                break
            try:
                stream = self._dialler.connect_tcp(str(address), port, left, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
            return TimedStream(stream, self._clock)
        raise unreachable()

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        """Refuse: no address of ours is a path."""
        raise unreachable()

    def _checked(self, host: str, port: int, seconds: float) -> list[Address]:
        answers = [parse_address(text) for text in _within(seconds, lambda: self._resolver(host, port))]
        addresses = [address for address in answers if address is not None]
        permitted = all(self._policy.permits(host, port, address) for address in addresses)
        if not addresses or len(addresses) != len(answers) or not permitted:
            raise unreachable()
        return addresses


class TimedStream(httpcore.NetworkStream):
    """A connection whose every wait ends with the fetch's time, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, clock: Clock) -> None:
        self._stream = stream
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read in short waits; a silence of ``timeout`` seconds ends it."""
        silent_until = time.monotonic() + (timeout or CONNECT_SECONDS)
        while True:
            try:
                return self._stream.read(max_bytes, min(SLICE_SECONDS, self._clock.left()))
            except httpcore.ReadTimeout:
                if time.monotonic() >= silent_until:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of ``buffer``."""
        self._stream.write(buffer, min(timeout or CONNECT_SECONDS, self._clock.left()))

    def close(self) -> None:
        """Hang up."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Encrypt; the certificate must be for the name that was asked for, not for the number that was dialled."""
        left = min(CONNECT_SECONDS, self._clock.left())
        return TimedStream(self._stream.start_tls(ssl_context, server_hostname, left), self._clock)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows of itself."""
        return self._stream.get_extra_info(info)


def _within(seconds: float, ask: Callable[[], list[str]]) -> list[str]:
    """Run a resolver that knows no time limit of its own; no answer in time is no answer."""
    answers: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(ask()), name="resolve", daemon=True).start()
    try:
        return answers.get(timeout=max(seconds, 0.0))
    except queue.Empty:
        return []
