"""Connections to hosts that nobody vouches for, and requests on them; what is common to fetching and to posting.

Knows TLS, the guard, and what every request of ours carries. Knows nothing of methods' meanings, redirects or bodies.
Reads no proxy, cookie or password from its surroundings.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.metadata import version
from typing import Final

import httpcore
import httpx

from impasto.fetch.addresses import Policy
from impasto.fetch.guard import Clock, PinnedBackend, Resolver, resolve

SILENCE_SECONDS: Final = 20.0  # longest wait for the next bytes, inside the clock's time
TROUBLE: Final = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError)
_AGENT: Final = f"impasto/{version('impasto')}"
_TIMEOUT: Final = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE_SECONDS)


class Dialler:
    """Connects to other hosts; safe to share between threads.

    Args:
        policy: What may be dialled.
        resolver: Turns names into addresses; the system's by default.
        tls: How certificates are checked; by default as usual, with ``SSL_CERT_FILE`` for an authority of one's own.
    """

    def __init__(self, policy: Policy, *, resolver: Resolver = resolve, tls: ssl.SSLContext | None = None) -> None:
        self._policy = policy
        self._resolver = resolver
        self._given_tls = tls

    def _pool(self, clock: Clock) -> httpcore.ConnectionPool:
        """Return connections that dial what the policy permits, until the clock runs out, and are not kept."""
        backend = PinnedBackend(self._policy, clock, self._resolver)
        return httpcore.ConnectionPool(self._tls, max_keepalive_connections=0, network_backend=backend)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._given_tls or httpx.create_ssl_context()


def streamed(
    pool: httpcore.ConnectionPool, method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes | None = None
) -> AbstractContextManager[httpcore.Response]:
    """Send a request, with our own name and the URL's host unless ``headers`` say otherwise; its answer is streamed.

    Raises:
        httpcore's exceptions of ``TROUBLE``, when the block is entered.
    """
    sent: dict[bytes | str, bytes | str] = {"Host": url.netloc, "User-Agent": _AGENT}
    sent.update(headers.items())
    where = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    return pool.stream(method, where, headers=sent, content=body, extensions={"timeout": _TIMEOUT})
