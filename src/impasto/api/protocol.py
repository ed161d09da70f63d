"""The HTTP/1.1 connection with limits that uvicorn's own has not: on the size of a head and on slow senders.

Knows bytes and times of one connection. Knows no routes. What it does not bound: how slowly a client may read its
answer, and how many connections an address may have; a proxy in front does that (docs/deploy.md).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEAD_BYTES: Final = 64 * 2**10  # of request line and headers; also of what follows a body, and between its parts
HEAD_SECONDS: Final = 15.0  # from a request's first byte (or the connection's start) to the end of its headers
BODY_SECONDS: Final = 30.0  # longest silence within a body


class GuardedProtocol(HttpToolsProtocol):
    """One connection, ended when its client sends too much head, or too slowly."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unread = 0  # bytes since the last end of a head or byte of a body
        self._waits: Literal["head", "body", ""] = "head"
        self._since = self.loop.time()
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first head."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless it has become too much head."""
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, "request headers too large")

    def on_message_begin(self) -> None:
        """A request's first byte is here."""
        self._waits, self._since = "head", self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole; how long the answer takes is not this connection's business."""
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:  # all at once
            self._refused = True
            self._refuse(431, "request headers too large")
            return
        self._unread = 0
        self._waits, self._since = "body", self.loop.time()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """More of the body is here."""
        self._unread = 0
        self._since = self.loop.time()
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._waits = ""
        if not self._refused:
            super().on_message_complete()

    def _look(self) -> None:
        """Give the client up if it is too slow, or look again when it could be."""
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if self.flow.read_paused:  # we do not read, so it cannot be blamed
            self._since = now
        limit = BODY_SECONDS if self._waits == "body" else HEAD_SECONDS
        if self._waits and now - self._since >= limit:
            self._refuse(408, "the request came too slowly")
            return
        left = limit - (now - self._since) if self._waits else limit
        self._timer = self.loop.call_later(max(0.01, min(left, HEAD_SECONDS, BODY_SECONDS)), self._look)

    def _refuse(self, status: int, text: str) -> None:
        """Say why, where nothing was answered yet, and hang up."""
        if self.cycle is None or self.cycle.response_complete or self._waits == "head":
            head = [STATUS_LINE[status], b"content-type: text/plain\r\nconnection: close\r\ncontent-length: "]
            self.transport.write(b"".join([*head, str(len(text)).encode(), b"\r\n\r\n", text.encode()]))
        self.transport.close()
