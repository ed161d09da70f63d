"""Serving finished pictures: ``GET /outputs/{blob}``.

Knows names, content types and the headers that keep a served file harmless. Knows nothing of keys: the name holds
128 random bits, so whoever has the URL was given it.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from fastapi.responses import Response

from impasto.api.fields import Schema
from impasto.api.schemas import responses
from impasto.api.service import ServiceDep
from impasto.errors import NotFound
from impasto.jobs.outputs import EXTENSIONS, content_type_of

# The picture can be shown and kept by its reader; it cannot be run, framed into scripts or stored by shared caches.
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, max-age=31536000, immutable",
    "Referrer-Policy": "no-referrer",
}


def picture(blob: str, service: ServiceDep) -> Response:
    """Return the picture's bytes. The type follows from the name alone and is always one of ours."""
    try:
        content_type = content_type_of(blob)
        data = service.outputs.get(blob)
    except NotFound:
        raise NotFound("no such picture") from None
    name = "-".join(blob.split("/")[::2])  # job id and index, without the secret part
    headers = _HEADERS | {"Content-Disposition": f'inline; filename="{name}"'}
    return Response(data, media_type=content_type, headers=headers)


def router() -> APIRouter:
    """Return the route, for GET and HEAD."""
    routes = APIRouter(tags=["files"])
    kinds: Schema = {"content": {content_type: {} for content_type in EXTENSIONS}}
    described = {200: kinds, **responses(404)}
    routes.add_api_route("/outputs/{blob:path}", picture, methods=["GET"], response_class=Response, responses=described)
    routes.add_api_route("/outputs/{blob:path}", picture, methods=["HEAD"], include_in_schema=False)
    return routes
