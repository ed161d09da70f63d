"""Reading a multipart form under a size limit: its texts, and its files as bytes.

Knows the form's encoding. Knows nothing of what a part is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from impasto.api.body import read_body
from impasto.errors import InvalidInput

MAX_FILES: Final = 20
MAX_FIELDS: Final = 100
_CHUNK: Final = 256 * 1024  # bytes parsed between two looks at other requests


@dataclass(frozen=True, slots=True)
class Multipart:
    """What a form held, in its order; a name may come more than once."""

    texts: list[tuple[str, str]]
    files: list[tuple[str, bytes]]

    def pictures(self, name: str) -> list[bytes]:
        """Return the files called ``name`` or ``name[]``; those without a byte are not given."""
        return [data for key, data in self.files if key in (name, f"{name}[]") and data]


def is_multipart(request: Request) -> bool:
    """Tell whether the body says that it is a form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_multipart(request: Request, limit: int) -> Multipart:
    """Return the form in the body.

    Raises:
        PayloadTooLarge: The body is longer than ``limit`` bytes.
        InvalidInput: It is no form, or has too many parts.
    """
    body = await read_body(request, limit)
    parser = MultiPartParser(
        request.headers, _pieces(body), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=limit
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        problem = error.message if isinstance(error, MultiPartException) else "broken"
        raise InvalidInput("", f"not a form that can be read: {problem}") from None
    texts: list[tuple[str, str]] = []
    files: list[tuple[str, bytes]] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.append((name, await value.read()))
        else:
            texts.append((name, value))
    await form.close()
    return Multipart(texts, files)


async def _pieces(body: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(body), _CHUNK):
        yield body[start : start + _CHUNK]
        await asyncio.sleep(0)
    yield b""
