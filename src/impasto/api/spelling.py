"""Paths as people write them: a base URL that ends in a slash makes ``//api/v3/…``, and some end a path with one.

Knows slashes. Knows no routes. Several clients put base and path together as they are, so that one slash too many in a
setting would be "there is nothing here" at every request.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES: Final = re.compile("/{2,}")


class Spelling:
    """Middleware that takes the slashes too many out of a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, under its plain path."""
        if scope["type"] == "http" and ("//" in scope["path"] or scope["path"].endswith("/")):
            scope = {**scope, "path": plain(scope["path"])}
        await self._app(scope, receive, send)


def plain(path: str) -> str:
    """Return a path with single slashes, and none at its end where it is the API's."""
    single = _SLASHES.sub("/", path)
    return single.rstrip("/") if single.startswith(("/api/", "/v1/")) else single
