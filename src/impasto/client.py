"""A client of our own HTTP API: submit, follow, read, cancel, send files ahead, fetch pictures.

Knows the routes, the prediction object and the event stream (``docs/api.md``, ``docs/progress.md``). Knows no settings,
no terminal and nothing of what is in a picture's bytes; imports no torch.

It talks to the one server that it is given. Redirects are not followed, and files are read from that server whatever
host their addresses name, so the key goes nowhere else.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import httpx
from httpx_sse import ServerSentEvent, connect_sse

from impasto.errors import (
    BadRequest,
    ConfigError,
    Conflict,
    Forbidden,
    ImpastoError,
    NotFound,
    PayloadTooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from impasto.prediction import Prediction, Update, read_event

API: Final = "/api/v3"
TIMEOUT: Final = httpx.Timeout(30.0, read=60.0)  # seconds; the event stream has a comment every 15
PATIENCE: Final = 60.0  # seconds in which a server that is full, or away, is asked again
PAUSES: Final = (0.5, 1.0, 2.0, 4.0)  # seconds between tries when the connection breaks
RECONNECT: Final = 1.0  # seconds before a stream of events is opened again
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_ERRORS: Final[Mapping[int, type[ImpastoError]]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
}


class Client:
    """A server of ours, and a key for it; usable from several threads.

    Args:
        url: Base address, such as ``http://127.0.0.1:8000``.
        key: API key, sent to that address alone.
        pause: Waits for some seconds; give one that looks around meanwhile, and raises to give up.
        patience: Seconds in which a server that is full or away is asked again.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(
        self, url: str, key: str, *, pause: Callable[[float], None] = time.sleep, patience: float = PATIENCE
    ) -> None:
        base = read_url(url)
        self._url = str(base).rstrip("/")
        self._signed = {"Authorization": f"Bearer {key}"}
        self.patience = patience
        self._pause = pause
        # A proxy of the environment is for other machines, and has no business with keys sent to this one.
        self._http = httpx.Client(timeout=TIMEOUT, trust_env=base.host not in LOOPBACK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def submit(self, model: str, body: Mapping[str, Any]) -> Prediction:
        """Submit a request; sent again after a broken connection, it is still one job.

        Args:
            model: Such as ``wavespeed-ai/sdxl-lora``.
            body: Fields of the request, as ``docs/api.md`` has them.

        Raises:
            ImpastoError: Refused, in the server's words; ``Unavailable`` if it does not answer.
        """
        once = {"Idempotency-Key": uuid.uuid4().hex}
        return Prediction.of(self._call("POST", f"{API}/{model}", json=dict(body), headers=once))

    def result(self, prediction_id: str) -> Prediction:
        """Read a prediction as it is now."""
        return Prediction.of(self._call("GET", f"{API}/predictions/{prediction_id}/result"))

    def cancel(self, prediction_id: str) -> Prediction:
        """Cancel a prediction; one that runs ends within about a second, one that has ended stays as it is."""
        return Prediction.of(self._call("POST", f"{API}/predictions/{prediction_id}/cancel"))

    @contextmanager
    def cancelling(self, prediction_id: str) -> Iterator[None]:
        """Cancel a prediction if the block is left by an error."""
        try:
            yield
        except BaseException:
            with suppress(ImpastoError):  # the first error is the one to tell
                self.cancel(prediction_id)
            raise

    def follow(self, prediction_id: str, tick: float = 0.5) -> Iterator[Update | None]:
        """Yield what happens to a prediction, up to the ``Prediction`` with which it ends.

        After each ``tick`` seconds in which nothing happened it yields ``None``, so that the caller can look around.
        Broken connections are mended without a word.

        Raises:
            ImpastoError: No such prediction of this key, or the server was away for longer than ``patience``.
        """
        listener = _Listener(self, prediction_id)
        try:
            while True:
                heard = listener.next(tick)
                if isinstance(heard, Exception):
                    raise heard
                yield heard
                if isinstance(heard, Prediction) and heard.ended:
                    return
        finally:
            listener.stop()

    def download(self, output: str) -> bytes:
        """Return the file at an address of ``outputs``, read from this server whatever host it names."""
        _, found, name = output.partition("/outputs/")
        if not found:
            raise NotFound(f"{output[:200]!r} is not the address of one of this server's pictures")
        return self._answer("GET", f"/outputs/{name}", signed=False).content

    def upload(self, file: Path, name: str | None = None) -> str:
        """Send a picture or LoRA ahead; return the address under which requests can name it."""
        with file.open("rb") as content:
            form = {"file": (name or file.name, content, "application/octet-stream")}
            return str(self._call("POST", f"{API}/media/upload/binary", files=form, tries=1)["download_url"])

    def has_upload(self, url: str) -> bool:
        """Whether an uploaded file is still there."""
        name = url.rpartition("/uploads/")[2]
        try:
            self._answer("HEAD", f"/uploads/{name}", signed=False)
        except NotFound:
            return False
        return True

    @contextmanager
    def listening(self, prediction_id: str, after: str) -> Iterator[tuple[httpx.Response, Iterator[ServerSentEvent]]]:
        """Open the stream of a prediction's events; for ``follow``."""
        url = f"{self._url}{API}/predictions/{prediction_id}/events"
        headers = self._signed | ({"Last-Event-ID": after} if after else {})
        with connect_sse(self._http, "GET", url, headers=headers) as source:
            if not source.response.is_success:
                source.response.read()
                raise _refusal(source.response, self._url)
            yield source.response, source.iter_sse() if source.response.status_code == 200 else iter(())

    def away(self, error: Exception) -> Unavailable:
        """Say that the server does not answer, and what to look at."""
        why = str(error) or type(error).__name__
        return Unavailable(
            f"the Impasto server at {self._url} does not answer ({why}): start it with `impasto serve`, or set "
            "another address"
        )

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """Return the ``data`` of an answer."""
        answer = self._answer(method, path, **options)
        try:
            return answer.json()["data"]
        except (ValueError, KeyError, TypeError):
            raise Unavailable(f"{self._url} does not answer like an Impasto server: check its address") from None

    def _answer(
        self,
        method: str,
        path: str,
        *,
        signed: bool = True,
        headers: Mapping[str, str] | None = None,
        tries: int = len(PAUSES) + 1,
        **options: Any,
    ) -> httpx.Response:
        """Return a success; ask again where that may help, for as long as patience lasts."""
        sent, waited = dict(headers or {}) | (self._signed if signed else {}), 0.0
        for attempt in range(1, 1000):
            try:
                answer = self._http.request(method, f"{self._url}{path}", headers=sent, **options)
            except httpx.TransportError as error:
                if attempt >= tries or waited >= self.patience:
                    raise self.away(error) from None
                seconds = PAUSES[min(attempt, len(PAUSES)) - 1]
            else:
                if answer.is_success:
                    return answer
                refusal = _refusal(answer, self._url)
                seconds = float(getattr(refusal, "retry_after", 0))
                if not seconds or tries == 1 or waited + seconds > self.patience:
                    raise refusal
            self._pause(seconds)
            waited += seconds
        raise AssertionError("patience ends before tries do")  # pragma: no cover


class _Listener:
    """A thread that hears a prediction's events, and what it has heard."""

    def __init__(self, client: Client, prediction_id: str) -> None:
        self._client, self._id = client, prediction_id
        self._heard: queue.SimpleQueue[Update | Exception] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._line: socket.socket | None = None
        threading.Thread(target=self._run, name=f"events of {prediction_id}", daemon=True).start()

    def next(self, seconds: float) -> Update | Exception | None:
        """Return the next thing, or ``None`` if there was none in this time."""
        try:
            return self._heard.get(timeout=seconds)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Hang up; closing a socket does not wake the thread that reads it, ending both its directions does."""
        self._stopped.set()
        if self._line is not None:
            with suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            self._listen()
        except httpx.TransportError as error:
            self._heard.put(self._client.away(error))
        except (ImpastoError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: the client was closed
            self._heard.put(error)

    def _listen(self) -> None:
        after, waited = "", 0.0
        while not self._stopped.is_set():
            try:
                with self._client.listening(self._id, after) as (response, events):
                    self._line = response.extensions["network_stream"].get_extra_info("socket")
                    if response.status_code == 204:  # the end is known already
                        self._heard.put(self._client.result(self._id))
                        return
                    for event in events:
                        after, waited = event.id or after, 0.0
                        if update := read_event(event):
                            self._heard.put(update)
                            if isinstance(update, Prediction) and update.ended:
                                return
                trouble: Exception = httpx.RemoteProtocolError("the stream of events ended early")
            except (httpx.TransportError, Unavailable) as error:
                trouble = error
            if waited >= self._client.patience:
                raise trouble
            self._stopped.wait(RECONNECT)
            waited += RECONNECT


def read_url(url: str) -> httpx.URL:
    """Return the base address of a server, checked.

    Raises:
        ConfigError: It is no http or https address, or has a user's name in it.
    """
    try:
        address = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise ConfigError(f"the server's address {url[:200]!r} cannot be read: {error}") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigError(f"the server's address must begin with http:// or https://, got {url[:200]!r}")
    if address.userinfo or address.query or address.fragment:
        raise ConfigError("the server's address must be a plain one such as https://impasto.example, without @, ? or #")
    return address


def _refusal(answer: httpx.Response, url: str) -> ImpastoError:
    """Turn an answer that is no success into the error that the server had, as far as it is told."""
    status, message = answer.status_code, _message(answer)
    if answer.is_redirect:
        return BadRequest(f"{url} redirects to {answer.headers.get('location', '')[:200]}; give that as the address")
    if status in (429, 503):
        kind = TooManyRequests if status == 429 else Unavailable
        seconds = answer.headers.get("retry-after", "")
        return kind(message, retry_after=int(seconds) if seconds.isdecimal() else 5)
    if status in _ERRORS:
        return _ERRORS[status](message)
    return BadRequest(message) if status < 500 else ImpastoError(message)


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {answer.request.url.path} with status {answer.status_code}"
