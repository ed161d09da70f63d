"""The page at ``/``: its files, and the headers that keep it from loading or running anything of anyone else's.

Knows file names and HTTP headers. Knows nothing of what the page does: it is a client of the API like any other,
signs its requests with the key its user typed, and gets no right by coming from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from impasto.api.service import ServiceDep
from impasto.config import Settings
from impasto.errors import NotFound

_FOLDER: Final = Path(__file__).with_suffix("")
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Own scripts and styles as files, own answers, and pictures that the page itself made: nothing else loads or runs,
# not even an inline style, and no text can become a script by way of the DOM.
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self'",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for anew: parts of two versions never meet
}
_STARTERS: Final = {
    "builtin": {
        "size": "512*512",
        "prompts": [
            "a mushroom on a pink background",
            "a rocket on a purple background",
            "a green cactus on a yellow background",
            "a red apple on a blue background",
        ],
    }
}
_STARTER: Final = {
    "prompts": [
        "a lighthouse at dusk, thick oil paint, visible palette-knife strokes",
        "still life with lemons and a blue jug, morning light, impasto",
        "an old fishing harbour in the rain, loose brushwork",
        "portrait of a red fox in tall grass, soft rim light",
    ],
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page, in memory: a name that is not in the table leads nowhere."""

    body: bytes
    content_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Asset:
        """Read a file of the package."""
        body = path.read_bytes()
        return cls(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    def answer(self, request: Request) -> Response:
        """Return the file, or 304 where the browser has this very one."""
        headers = _HEADERS | {"ETag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.content_type)


def assets() -> Mapping[str, Asset]:
    """Return the files of the page by name."""
    return {path.name: Asset.read(path) for path in _FOLDER.iterdir() if path.suffix in _TYPES}


def router() -> APIRouter:
    """Return the page at ``/``, its files, and what it must know of this server before there is a key."""
    routes, files = APIRouter(include_in_schema=False), assets()

    async def page(request: Request) -> Response:
        return files["index.html"].answer(request)

    async def server(service: ServiceDep) -> Response:
        return JSONResponse(_server(service.settings), headers=_HEADERS)

    async def asset(name: str, request: Request) -> Response:
        if name not in files:
            raise NotFound(f"the page has no file {name[:100]!r}")
        return files[name].answer(request)

    routes.add_api_route("/", page, methods=["GET"])
    routes.add_api_route("/static/server.json", server, methods=["GET"])
    routes.add_api_route("/static/{name}", asset, methods=["GET"])
    return routes


def _server(settings: Settings) -> dict[str, Any]:
    """Return what suits this server: whether it can refine, and prompts and a size that its model draws well."""
    return {"refiner": settings.refiner is not None, **_STARTERS.get(settings.model, _STARTER)}
