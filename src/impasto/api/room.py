"""Memory for request bodies and the pictures in them: how many large ones may be read and decoded at once.

Knows bytes, pixels and waiting. Knows nothing of what is in a body. Small bodies never wait.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from fastapi import Request

from impasto.errors import Unavailable

SMALL: Final = 256 * 2**10  # bytes
LARGEST_AT_ONCE: Final = 4  # bodies of the largest size
WAIT_SECONDS: Final = 30.0
PIXELS: Final = 50_000_000  # decoded at once; ten bytes or so for each are held


class BodyRoom:
    """Room for large bodies, given in the order it was asked for.

    Args:
        largest: The limit on one body, in bytes; there is room for ``LARGEST_AT_ONCE`` such.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._free = LARGEST_AT_ONCE * largest
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, request: Request) -> AsyncIterator[None]:
        """Hold room for a request's body during a block, as much as it announces.

        Raises:
            Unavailable: There was none for a long time.
        """
        announced = request.headers.get("content-length", "")
        size = min(int(announced), self._largest) if announced.isdecimal() else self._largest
        if announced.isdecimal() and size <= SMALL:
            yield
            return
        await self._take(size)
        try:
            yield
        finally:
            self._free += size
            self._serve()

    async def _take(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        self._serve()
        try:
            await asyncio.wait_for(asyncio.shield(turn), WAIT_SECONDS)
        except (TimeoutError, asyncio.CancelledError) as error:
            if turn.done():
                self._free += size
            else:
                self._queue.remove((size, turn))
            self._serve()
            if isinstance(error, TimeoutError):
                raise Unavailable("many large requests are being read; send it again", 10) from None
            raise

    def _serve(self) -> None:
        while self._queue and self._queue[0][0] <= self._free:
            size, turn = self._queue.popleft()
            self._free -= size
            turn.set_result(None)


class PixelRoom:
    """Room for pictures while they are decoded and encoded anew, in threads; one of the largest fits."""

    def __init__(self, pixels: int = PIXELS) -> None:
        self._most = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, data: bytes, field: str) -> Iterator[None]:
        """Hold room for the picture in ``data`` during a block; waits until there is some.

        Raises:
            InvalidInput: It is no picture, or has too many pixels.
        """
        from impasto.images import count_pixels

        pixels = min(count_pixels(data, field), self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


ROOM: Final = PixelRoom()
