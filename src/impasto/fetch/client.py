"""GET from a host that nobody vouches for.

Knows HTTP: redirects, tokens, limits, and what an answer must keep to. Knows nothing of what is fetched, of files or
of caches. Reads no proxy, cookie or password from its surroundings; follows few redirects and checks each like the
first address; keeps a token for the one site it is for; asks for bytes as they are and counts them while they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpcore
import httpx

from impasto.fetch.addresses import Origin, origin_of
from impasto.fetch.dial import TROUBLE, Dialler, streamed
from impasto.fetch.failure import FetchFailed, Reason, unreachable
from impasto.fetch.guard import Clock

MAX_REDIRECTS: Final = 3
MAX_JSON_BYTES: Final = 8_000_000
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Token:
    """A secret for one site."""

    origin: Origin
    secret: str

    def __repr__(self) -> str:
        return f"Token({self.origin[1]})"

    @classmethod
    def of(cls, endpoint: str, secret: str | None) -> Token | None:
        """Return the token for a site's base URL, or ``None`` without a secret."""
        return cls(origin_of(httpx.URL(endpoint)), secret) if secret else None


class Answer:
    """The head of an answer, and its body to be read once.

    Attributes:
        status: HTTP status.
        headers: By lower-case name.
        first_headers: Those of the first answer, before any redirect.
    """

    def __init__(
        self, response: httpcore.Response, first_headers: Mapping[str, str], max_bytes: int, clock: Clock
    ) -> None:
        self.status = response.status
        self.headers = _headers(response)
        self.first_headers = first_headers
        self._response = response
        self._max_bytes = max_bytes
        self._clock = clock

    @property
    def length(self) -> int | None:
        """Bytes of the body, where the site says so."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it comes.

        Raises:
            FetchFailed: It is larger than allowed, breaks off, or takes too long.
        """
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise FetchFailed("broken", "came compressed although it was asked for as it is: try another address")
        self._check(self.length or 0)
        count = 0
        with _told("broken"):
            for chunk in self._response.iter_stream():
                count += len(chunk)
                self._check(count)
                self._clock.left()
                yield chunk

    def read(self) -> bytes:
        """Return the whole body."""
        return b"".join(self.chunks())

    def failure(self) -> FetchFailed:
        """Return the failure that this status means."""
        wait = self.headers.get("retry-after", "")
        retry_after = int(wait) if wait.isascii() and wait.isdigit() and len(wait) < 7 else None
        code = self.headers.get("x-error-code", "")[:100]
        problem = _problem(self.status, retry_after)
        return FetchFailed("status", problem, status=self.status, code=code, retry_after=retry_after)

    def _check(self, count: int) -> None:
        if count > self._max_bytes:
            most = f"at most {self._max_bytes / 1e6:.4g} MB are fetched"
            raise FetchFailed("too_large", f"is too large: {most}; give a smaller file")


class Client(Dialler):
    """Fetches from other hosts; safe to share between threads."""

    @contextmanager
    def open(
        self,
        url: str,
        clock: Clock,
        *,
        max_bytes: int,
        headers: Mapping[str, str] | None = None,
        token: Token | None = None,
    ) -> Iterator[Answer]:
        """GET ``url`` and follow its redirects; any final status comes back as an answer.

        Args:
            url: The address, as somebody wrote it.
            clock: For everything until the end of the block.
            max_bytes: Largest body.
            headers: To send, to every hop.
            token: Sent to its own site alone, and never again once a redirect has left that site.

        Raises:
            FetchFailed: No answer, or not an address that may be fetched.
        """
        target, first = self._policy.read_url(url), None
        own = origin_of(target) in self._policy.origins
        with ExitStack() as closing:
            pool = closing.enter_context(self._pool(clock))
            for _ in range(MAX_REDIRECTS + 1):
                token = token if token and token.origin == origin_of(target) else None
                hop = ExitStack()
                closing.push(hop)
                response = _get(hop, pool, target, headers or {}, token)
                first = _headers(response) if first is None else first
                if response.status not in _REDIRECTS:
                    yield Answer(response, first, max_bytes, clock)
                    return
                target = self._next(target, _headers(response).get("location", ""), own)
                hop.close()
            raise FetchFailed("status", f"redirects more than {MAX_REDIRECTS} times: give the final address")

    def json(self, url: str, clock: Clock, token: Token | None = None) -> Any:
        """GET a JSON document.

        Raises:
            FetchFailed: No document; with reason ``status`` where the site said so.
        """
        headers = {"Accept": "application/json"}
        with self.open(url, clock, max_bytes=MAX_JSON_BYTES, headers=headers, token=token) as answer:
            if answer.status != 200:
                raise answer.failure()
            body = answer.read()
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise FetchFailed("broken", "got an answer that is no JSON from the site: try again later") from None

    def _next(self, target: httpx.URL, location: str, own: bool) -> httpx.URL:
        try:
            return self._policy.read_url(str(target.join(location)), from_own_site=own)
        except (httpx.InvalidURL, ValueError):
            raise unreachable() from None
        except FetchFailed as failure:
            raise FetchFailed(failure.reason, f"redirects to an address that {failure}") from None


def _get(
    hop: ExitStack, pool: httpcore.ConnectionPool, url: httpx.URL, headers: Mapping[str, str], token: Token | None
) -> httpcore.Response:
    sent = {"Accept": "*/*", "Accept-Encoding": "identity", **headers}
    if token is not None:
        sent["Authorization"] = f"Bearer {token.secret}"
    with _told("unreachable"):
        return hop.enter_context(streamed(pool, "GET", url, sent))


def _headers(response: httpcore.Response) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


@contextmanager
def _told(reason: Reason) -> Iterator[None]:
    """Turn trouble with a connection into a failure that tells nothing of the network here."""
    try:
        yield
    except TROUBLE:
        if reason == "unreachable":
            raise unreachable() from None
        raise FetchFailed(reason, "broke off before its end: try again") from None


def _problem(status: int, retry_after: int | None) -> str:
    match status:
        case 401 | 403:
            return f"needs a login there (status {status}): give an address that anybody may read"
        case 404 | 410:
            return f"was not found there (status {status}): check the address"
        case 429:
            wait = f"in {retry_after} s" if retry_after else "later"
            return f"is refused for now, because its site wants fewer requests (status 429): try again {wait}"
        case _:
            return f"was answered with status {status} there: try again later, or give another address"
