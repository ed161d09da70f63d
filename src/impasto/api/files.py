"""Serving files: finished pictures at ``/outputs/…``, uploads at ``/uploads/…``.

Knows names, content types, ranges and the headers that keep a served file harmless. Knows nothing of keys: a name
holds 128 random bits, so whoever has the URL was given it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from impasto.api.fields import Schema
from impasto.api.schemas import responses
from impasto.api.service import Service, ServiceDep
from impasto.errors import NotFound
from impasto.jobs.outputs import EXTENSIONS, UPLOAD_EXTENSIONS, content_type_of

AT_ONCE: Final = 4 * 2**20  # bytes that are read in one go; larger files are streamed
YEAR: Final = 31536000  # seconds
# The file can be shown and kept by its reader; it cannot be run, framed into scripts or stored by shared caches.
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
    "Accept-Ranges": "bytes",
}
_RANGE: Final = re.compile(r"bytes=(?P<first>\d{0,18})-(?P<last>\d{0,18})", re.ASCII)
_UPLOAD: Final = re.compile(r"(?P<id>[0-9a-f]{32})\.\w{1,12}", re.ASCII)


def picture(blob: str, request: Request, service: ServiceDep) -> Response:
    """Return a finished picture. The type follows from the name alone and is always one of ours."""
    name = "-".join(blob.split("/")[::2])  # job id and index, without the secret part
    try:
        return _served(request, service, blob, content_type_of(blob), name, service.settings.output_seconds or YEAR)
    except NotFound:
        raise NotFound("no such picture; it may have been deleted") from None


def upload(name: str, request: Request, service: ServiceDep) -> Response:
    """Return an uploaded file, as what its bytes are, whatever the ending of the address says."""
    try:
        match = _UPLOAD.fullmatch(name)
        found = service.uploads.find(match["id"] if match else "")
        shown = f"upload.{UPLOAD_EXTENSIONS[found.content_type]}"
        return _served(request, service, found.blob, found.content_type, shown, service.settings.upload_seconds)
    except NotFound:
        raise NotFound("no such upload; it may have been deleted") from None


def _served(request: Request, service: Service, blob: str, content_type: str, name: str, kept: float) -> Response:
    """Answer with the file, a part of it (RFC 9110, 14), or "you have it already" (13.1.2)."""
    size = service.outputs.size(blob)
    tag = f'"{hashlib.sha256(blob.encode()).hexdigest()[:32]}"'  # a name's file never changes
    headers = _HEADERS | {
        "ETag": tag,
        "Cache-Control": f"private, max-age={min(int(kept), YEAR)}, immutable",
        "Content-Disposition": f'inline; filename="{name}"',
    }
    known = request.headers.get("if-none-match", "")
    if tag in known or known.strip() == "*":
        return Response(status_code=304, headers=headers)
    status, start, end = 200, 0, size
    if span := _span(request, tag, size):
        if span[0] >= span[1]:
            return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{size}"})
        status, (start, end) = 206, span
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content_type)
    chunks = service.outputs.chunks(blob, start, end)
    if end - start <= AT_ONCE:
        return Response(b"".join(chunks), status, headers, content_type)
    return StreamingResponse(chunks, status, headers, content_type)


def _span(request: Request, tag: str, size: int) -> tuple[int, int] | None:
    """Return the one range of bytes that is asked for, up to its end; several at once are answered with all bytes."""
    match = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if request.headers.get("if-range", tag) != tag or match is None or match[0] == "bytes=-":
        return None
    if not match["first"]:
        return max(0, size - int(match["last"])), size
    first, last = int(match["first"]), int(match["last"] or size - 1)
    return None if match["last"] and last < first else (first, min(last + 1, size))


def router() -> APIRouter:
    """Return the routes, for GET and HEAD."""
    routes = APIRouter(tags=["files"])
    _add(routes, "/outputs/{blob:path}", picture, list(EXTENSIONS))
    _add(routes, "/uploads/{name}", upload, list(UPLOAD_EXTENSIONS))
    return routes


def _add(routes: APIRouter, path: str, endpoint: Callable[..., Any], types: list[str]) -> None:
    kinds: Schema = {"content": {content_type: {} for content_type in types}}
    described: dict[int | str, dict[str, Any]] = {200: kinds, 206: kinds, **responses(404)}
    routes.add_api_route(path, endpoint, methods=["GET"], response_class=Response, responses=described)
    routes.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
