"""The service as it is served, on a loopback port; and raw sockets to it, which may send what no client would."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract.conftest import Stack, serve, stack

__all__ = ["serve", "stack"]  # the fixtures of the contract tests serve here, too


class Raw:
    """A connection that sends bytes as they are."""

    def __init__(self, stack: Stack, seconds: float = 10) -> None:
        port = int(stack.url.rpartition(":")[2])
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)

    def send(self, data: bytes) -> bool:
        """Send; tell whether the other side still took it."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        parts = []
        try:
            while part := self.socket.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)


@pytest.fixture
def raw(stack: Stack) -> Iterator[Callable[..., Raw]]:
    """Open raw connections that are closed after the test."""
    opened: list[Raw] = []

    def connect(**options: Any) -> Raw:
        opened.append(Raw(stack, **options))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.socket.close()
