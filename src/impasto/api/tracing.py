"""Each request's id, a line in the log for what it did, and its line in the audit log.

Knows requests as they pass and what routes note of them (``logs.note``). Knows nothing of any route. What is written
holds no text of a client's: routes are templates, ids have their forms.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from impasto.api.traffic import METHODS, NOBODY, OTHER
from impasto.audit import AuditLog
from impasto.logs import begin_facts

HEADER: Final = "x-request-id"
FAULT: Final = 500
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
REFUSED: Final = frozenset({401, 403})
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_AUDITED: Final = ("key_id", "prediction_id", "prediction_ids", "cost", "loras")

log = logging.getLogger(__name__)


class Tracing:
    """Middleware that gives each request an id, the client's own where that is one, and writes down what became of it.

    Args:
        app: The application.
        audit: Where to write; without one, only to the log.
    """

    def __init__(self, app: ASGIApp, audit: AuditLog | None = None) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; its answer has the id unless its route gave it another."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {"request_id": request_id(Headers(scope=scope).get(HEADER, ""))}
        begin_facts(facts)
        began, status = time.perf_counter(), NOBODY

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault(HEADER, facts["request_id"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = FAULT
            raise
        finally:
            self._told(scope, facts, status, round((time.perf_counter() - began) * 1000))

    def _told(self, scope: Scope, facts: dict[str, Any], status: int, milliseconds: int) -> None:
        method = scope["method"] if scope["method"] in METHODS else OTHER
        route = getattr(scope.get("route"), "path", OTHER)
        reading = method in READING
        log.log(logging.DEBUG if reading else logging.INFO, "%s %s %d %d ms", method, route, status, milliseconds)
        if self._audit and (not reading or status in REFUSED):
            known = {name: facts[name] for name in _AUDITED if name in facts}
            about = {"request_id": facts["request_id"], "method": method, "route": route, "status": status}
            self._audit.write(about | known)


def request_id(sent: str) -> str:
    """Return the id that the client sent, if it has the form of one, or a new one."""
    return sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
