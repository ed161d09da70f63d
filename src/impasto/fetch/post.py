"""POST to an address that nobody vouches for: a few bytes out, a status back.

Knows HTTP and what may be dialled (``guard.py``, ``addresses.py``). Knows nothing of what is sent. Follows no redirect,
reads no proxy, cookie or password from its surroundings, and never reads the answer's body.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from ipaddress import ip_address
from typing import Final

import httpcore
import httpx

from impasto.fetch.addresses import Policy, parse_address
from impasto.fetch.failure import FetchFailed, unreachable
from impasto.fetch.guard import Clock, PinnedBackend, Resolver, resolve

SILENCE_SECONDS: Final = 20.0  # longest wait for the next bytes, inside the clock's time
_AGENT: Final = f"impasto/{version('impasto')}"
_LOOPBACK: Final = ip_address("127.0.0.1")


class Poster:
    """Posts to other hosts; safe to share between threads.

    Args:
        policy: What may be dialled.
        resolver: Turns names into addresses; the system's by default.
        tls: How certificates are checked; by default as usual, with ``SSL_CERT_FILE`` for an authority of one's own.
    """

    def __init__(self, policy: Policy, *, resolver: Resolver = resolve, tls: ssl.SSLContext | None = None) -> None:
        self._policy = policy
        self._resolver = resolver
        self._given_tls = tls

    def check(self, url: str) -> str:
        """Return the address in its plain form, if it could be posted to as far as can be told without a network.

        A name is resolved when it is dialled, and what it stands for then is checked then.

        Raises:
            FetchFailed: Another scheme or port, a user name, or a number (or ``localhost``) that may not be dialled.
        """
        target = self._policy.read_url(url)
        host = target.raw_host.decode("ascii").lower().rstrip(".")
        address = parse_address(host) or (_LOOPBACK if host.rpartition(".")[2] == "localhost" else None)
        if address is not None and not self._policy.permits(host, target.port or 0, address):
            raise unreachable()
        return str(target)

    def post(self, url: str, body: bytes, headers: Mapping[str, str], clock: Clock) -> int:
        """Send ``body`` and return the answer's status.

        Raises:
            FetchFailed: No answer, or not an address that may be posted to.
        """
        target = self._policy.read_url(url)
        sent: dict[bytes | str, bytes | str] = {"Host": target.netloc, "User-Agent": _AGENT, "Connection": "close"}
        sent.update(headers.items())
        sent["Content-Length"] = str(len(body))
        where = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE_SECONDS)
        backend = PinnedBackend(self._policy, clock, self._resolver)
        with httpcore.ConnectionPool(self._tls, max_keepalive_connections=0, network_backend=backend) as pool:
            try:
                with pool.stream(
                    "POST", where, headers=sent, content=body, extensions={"timeout": timeout}
                ) as response:
                    return response.status
            except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
                raise FetchFailed("broken", "did not answer properly") from None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._given_tls or httpx.create_ssl_context()
