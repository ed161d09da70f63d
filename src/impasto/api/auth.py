"""Who is asking, and may they: bearer keys and their scopes.

Knows the ``Authorization`` header, the key store, and which scope a route needs. Knows nothing of what routes do, or of
how much a key may do (``jobs/limits.py``). Every key sees its own jobs alone; the stores see to that.
"""

from __future__ import annotations

import hashlib
import re
import time
from functools import lru_cache, partial
from typing import Annotated, Final

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from impasto.api.patience import patiently
from impasto.errors import Forbidden, Unauthorized
from impasto.jobs.keys import Key, KeyStore, Scope
from impasto.jobs.records import is_job_id
from impasto.logs import note

EXPECTED = 'send the header "Authorization: Bearer <your key>"'
_SCHEME = HTTPBearer(auto_error=False, description="An API key, made by `impasto keys create NAME`.")
# What says nothing of a key's own work: any key may try itself here.
_OPEN: Final = re.compile(r"/models(/.*)?|.*/model/pric(e|ing)|.*balance")
# Questions that are asked by POST.
_ASKING: Final = re.compile(r".*/(predictions|billings/search|user/usage_stats)")
_SIGNING: Final = re.compile(r".*/webhook/secret")  # whoever has it can send webhooks in our name


@lru_cache(1000)  # routes and methods are few, and every request asks
def needed_scope(method: str, route: str) -> Scope | None:
    """Return the scope that a route needs, ``None`` where any key will do; whatever is not known here generates.

    Args:
        method: Of the request.
        route: The route's path as a template.
    """
    path = re.sub(r"^/(api/v\d|v1)(?=/)", "", route)
    if path == "/metrics":
        return Scope.METRICS
    if _OPEN.fullmatch(path):
        return None
    reading = method in ("GET", "HEAD") or _ASKING.fullmatch(path)
    return Scope.READ if reading and not _SIGNING.fullmatch(path) else Scope.GENERATE


class KeyCheck:
    """Finds the key behind a secret; remembers good ones for a few seconds, by hash, so that polling is cheap.

    A key that was revoked or has expired may read for up to ``remember_seconds`` more in this process; a submit or an
    upload of its is refused at once, by the transaction that would take it.
    """

    def __init__(self, keys: KeyStore, remember_seconds: float = 5.0) -> None:
        self._keys = keys
        self._remember_seconds = remember_seconds
        self._good: dict[bytes, tuple[Key, float]] = {}

    async def __call__(self, secret: str) -> Key:
        """Return the key, or raise ``Unauthorized``."""
        digest = hashlib.sha256(secret.encode()).digest()
        key, until = self._good.get(digest, (None, 0.0))
        if key is not None and time.monotonic() < until:
            return key
        self._good.pop(digest, None)
        key = await run_in_threadpool(self._keys.authenticate, secret)
        self._good[digest] = (key, time.monotonic() + self._remember_seconds)
        return key


async def caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_SCHEME)]
) -> Key:
    """Return the key that signed ``request``.

    Raises:
        Unauthorized: No bearer key was sent, or not one of ours; the message says what is expected.
        Forbidden: The key lacks the scope that the route needs.
    """
    secret = credentials.credentials.strip() if credentials else ""
    if not secret:
        raise Unauthorized(f"missing API key: {EXPECTED}")
    service = request.app.state.service
    patience = service.settings.database_patience if request.method == "GET" else 0
    try:
        key: Key = await patiently(patience, partial(service.key_check, secret))
    except Unauthorized:
        raise Unauthorized(f"unknown, revoked or expired API key: {EXPECTED}") from None
    note(key_id=key.id)
    if is_job_id(prediction := request.path_params.get("prediction_id", "")):
        note(prediction_id=prediction)
    scope = needed_scope(request.method, getattr(request.scope.get("route"), "path", ""))
    if scope is not None and scope not in key.scopes:
        raise Forbidden(f"this API key lacks the scope '{scope}', which this needs; make one that has it")
    return key


CallerDep = Annotated[Key, Depends(caller)]
