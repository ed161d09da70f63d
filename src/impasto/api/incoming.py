"""One file of a request on its way in: from the socket to a temporary file, a part at a time.

Knows limits, forms and temporary files; at most ``PART_BYTES`` and what the socket has just brought are in memory.
Knows nothing of what is in the file, of keys or of where it is kept. A temporary file is gone when its block ends;
one that a killed process leaves behind is deleted by age.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from impasto.errors import BadRequest, InvalidInput, PayloadTooLarge

if TYPE_CHECKING:
    from tempfile import _TemporaryFileWrapper

PART_BYTES: Final = 2**20  # written at once
STALE_SECONDS: Final = 86400.0  # after which nobody is still sending
FIELD: Final = "file"  # of a form
_FORM_ROOM: Final = 64 * 2**10  # for what a form has around its file
_SUFFIX: Final = ".part"


@asynccontextmanager
async def spooled(chunks: AsyncIterator[bytes], folder: Path, limit: int) -> AsyncIterator[Path]:
    """Write what comes to a temporary file in ``folder`` and yield its path; afterwards it is deleted.

    Raises:
        PayloadTooLarge: More than ``limit`` bytes come.
    """
    await run_in_threadpool(folder.mkdir, parents=True, exist_ok=True)
    file = await run_in_threadpool(_temporary, folder)
    try:
        size, part = 0, bytearray()
        async for chunk in chunks:
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            part += chunk
            if len(part) >= PART_BYTES:
                await run_in_threadpool(_write, file, bytes(part))
                part.clear()
        await run_in_threadpool(_write, file, bytes(part))
        await run_in_threadpool(file.flush)
        yield Path(file.name)
    finally:
        await run_in_threadpool(file.close)


def _temporary(folder: Path) -> _TemporaryFileWrapper[bytes]:
    return tempfile.NamedTemporaryFile(dir=folder, suffix=_SUFFIX)  # closed by its user, in another thread


def _write(file: _TemporaryFileWrapper[bytes], part: bytes) -> None:
    file.write(part)


def sweep(folder: Path) -> int:
    """Delete what killed processes left half-written; return how many files."""
    stale = [file for file in folder.glob(f"*{_SUFFIX}") if time.time() - file.stat().st_mtime > STALE_SECONDS]
    for file in stale:
        file.unlink(missing_ok=True)
    return len(stale)


def check_announced(request: Request, limit: int, around: int = 0) -> None:
    """Refuse a body by its announced length, before any of it is read.

    Raises:
        PayloadTooLarge: It is over ``limit`` bytes, and what may be ``around`` the file.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit + around:
        raise too_large(limit)


def too_large(limit: int) -> PayloadTooLarge:
    """Return the refusal of a file over ``limit`` bytes."""
    return PayloadTooLarge(f"file too large: at most {limit} bytes are taken")


class FormFile:
    """The part ``file`` of a form (RFC 7578), as it arrives; other parts are passed over.

    Attributes:
        filename: As the client named it; empty if it did not, or before the part began.
    """

    def __init__(self, request: Request) -> None:
        """Look at the request's header alone.

        Raises:
            BadRequest: It is no form.
        """
        kind, parameters = parse_options_header(request.headers.get("content-type"))
        boundary = parameters.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise BadRequest(f'send the file as multipart/form-data, in the field "{FIELD}"')
        self.filename = ""
        self._request = request
        self._found = self._taking = self._ended = False
        self._arrived = bytearray()
        self._name, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header,
                "on_headers_finished": self._headers,
                "on_part_data": self._data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    async def chunks(self, limit: int) -> AsyncIterator[bytes]:
        """Yield the file's bytes as they come.

        Raises:
            PayloadTooLarge: The form is larger than a file of ``limit`` bytes makes it.
            InvalidInput: It has no file.
            BadRequest: It is broken or cut off.
        """
        check_announced(self._request, limit, _FORM_ROOM)
        received = 0
        async for data in self._request.stream():
            received += len(data)
            if received > limit + _FORM_ROOM:
                raise too_large(limit)
            self._parse(data)
            if self._arrived:
                yield bytes(self._arrived)
                self._arrived.clear()
        if not self._ended:
            raise BadRequest("the form is cut off: its last boundary is missing")
        if not self._found:
            raise InvalidInput(FIELD, f'property "{FIELD}" is missing')

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadRequest(f"not valid multipart/form-data: {error}") from None

    def _begin(self) -> None:
        self._disposition = b""

    def _header(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._taking = not self._found and options.get(b"name") == FIELD.encode()
        if self._taking:
            self._found = True
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._taking:
            self._arrived += data[start:end]

    def _part_end(self) -> None:
        self._taking = False

    def _end(self) -> None:
        self._ended = True
