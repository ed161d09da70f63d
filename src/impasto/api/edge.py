"""What stands between the socket and the routes: which names are answered to, whom a proxy speaks for, which pages of
other sites may read answers, and headers that every answer has.

Knows HTTP headers and the settings about them. Knows no keys and no routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from impasto.api.errors import error_response
from impasto.api.headers import SECURITY_HEADERS
from impasto.config import Settings

PROBES: Final = frozenset({"/health", "/healthz", "/readyz"})  # asked by address, and they tell nothing
_METHODS: Final = ("GET", "POST", "PUT", "DELETE")
_CLIENT: Final = ("X-Client-Name", "X-Client-Version", "X-Client-OS")  # the hosted API's own clients send these
_SENT: Final = ("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Range", *_CLIENT)
_SHOWN: Final = ("Retry-After", "Content-Range", "ETag", "x-request-id")
_REMEMBERED: Final = 600  # seconds that a browser keeps a permission


def install(app: FastAPI, settings: Settings) -> None:
    """Put the edge around an application; the last one added is the outermost."""
    if settings.cors_origins:
        app.add_middleware(CrossOrigin, origins=settings.cors_origins)
    app.add_middleware(Secured)
    if settings.allowed_hosts:
        app.add_middleware(KnownHosts, hosts=settings.allowed_hosts)
    app.add_middleware(Forwarded, proxies=settings.trusted_proxies)


class Secured:
    """Adds to every answer the headers that it does not have: no sniffing, no framing, no scripts, no referrer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, adding)


class KnownHosts:
    """Refuses requests for other names than ours, which a page elsewhere may have bent to our address (DNS rebinding).

    Args:
        app: The application.
        hosts: Names without a port; ``*.example`` stands for every name below ``example``.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = tuple(host.lower().rstrip(".") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 400."""
        if scope["type"] == "http" and scope["path"] not in PROBES and not self._known(Headers(scope=scope)):
            refusal = error_response(400, "this service does not answer to that host name", dict(SECURITY_HEADERS))
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        hosts = headers.getlist("host")
        name = host_name(hosts[0]) if len(hosts) == 1 else ""
        return any(fnmatchcase(name, host) for host in self._hosts)


def host_name(host: str) -> str:
    """Return the name in a ``Host`` header, in lower case, without port and final dot; brackets stay."""
    name, colon, port = host.strip().lower().rpartition(":")
    return (name if colon and port.isdecimal() else host.strip().lower()).rstrip(".")


class CrossOrigin(CORSMiddleware):
    """Lets pages of the named origins read answers. No cookies are used, so none are allowed.

    A page without an origin of its own (``null``: a sandboxed frame, a local file) gets nothing, not even by ``*``.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_SENT,
            expose_headers=_SHOWN,
            allow_credentials=False,
            max_age=_REMEMBERED,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with or without permissions in its answer."""
        null = scope["type"] == "http" and Headers(scope=scope).get("origin", "").strip().lower() == "null"
        await (self.app if null else super().__call__)(scope, receive, send)


class Forwarded:
    """Believes ``X-Forwarded-For``, ``-Proto`` and ``-Host`` of trusted proxies; of all others they are taken out.

    Args:
        app: The application.
        proxies: Addresses and blocks of the proxies.
    """

    def __init__(self, app: ASGIApp, proxies: Sequence[str]) -> None:
        self._app = app
        self._believing = ProxyHeadersMiddleware(app, list(proxies))  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on as the proxy tells it, or as it came."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client, headers = scope.get("client"), Headers(scope=scope)
        if client and client[0] in self._believing.trusted_hosts:
            host = headers.get("x-forwarded-host", "").split(",")[0].strip()
            kept = [(name, value) for name, value in scope["headers"] if not host or name != b"host"]
            told = [*kept, (b"host", host.encode("latin-1"))] if host else kept
            await self._believing({**scope, "headers": told}, receive, send)  # type: ignore[arg-type]
        else:
            kept = [(name, value) for name, value in scope["headers"] if not _forwarding(name)]
            await self._app({**scope, "headers": kept}, receive, send)


def _forwarding(name: bytes) -> bool:
    return name.startswith(b"x-forwarded-") or name in (b"forwarded", b"x-real-ip")
