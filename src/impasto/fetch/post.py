"""POST to an address that nobody vouches for: a few bytes out, a status back.

Knows HTTP and what may be dialled (``guard.py``, ``addresses.py``). Knows nothing of what is sent. Follows no redirect,
reads no proxy, cookie or password from its surroundings, and never reads the answer's body.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final

from impasto.fetch.addresses import parse_address
from impasto.fetch.dial import TROUBLE, Dialler, streamed
from impasto.fetch.failure import FetchFailed, unreachable
from impasto.fetch.guard import Clock

_LOOPBACK: Final = ip_address("127.0.0.1")


class Poster(Dialler):
    """Posts to other hosts; safe to share between threads."""

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
        sent = {"Connection": "close", **headers, "Content-Length": str(len(body))}
        with self._pool(clock) as pool:
            try:
                with streamed(pool, "POST", target, sent, body) as response:
                    return response.status
            except TROUBLE:
                raise FetchFailed("broken", "did not answer properly") from None
