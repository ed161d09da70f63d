"""Who is asking: bearer keys.

Knows the ``Authorization`` header and the key store. Knows nothing of what a key may do: every key may use
everything, on its own jobs.
"""

from __future__ import annotations

import hashlib
import time
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from impasto.errors import Unauthorized
from impasto.jobs.keys import Key, KeyStore

EXPECTED = 'send the header "Authorization: Bearer <your key>"'
_SCHEME = HTTPBearer(auto_error=False, description="An API key, made by `impasto keys create NAME`.")


class KeyCheck:
    """Finds the key behind a secret; remembers good ones for a few seconds, by hash, so that polling is cheap.

    A revoked key may work for up to ``remember_seconds`` more in this process.
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
    """
    secret = credentials.credentials.strip() if credentials else ""
    if not secret:
        raise Unauthorized(f"missing API key: {EXPECTED}")
    try:
        key: Key = await request.app.state.service.key_check(secret)
    except Unauthorized:
        raise Unauthorized(f"unknown or revoked API key: {EXPECTED}") from None
    return key


CallerDep = Annotated[Key, Depends(caller)]
