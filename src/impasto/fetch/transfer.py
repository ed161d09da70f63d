"""One file from another host into a part file on disk, gone on with where an earlier try ended.

Knows ranges, hashes and part files. Knows no cache and no site's protocol. A part file is never taken for a whole one:
what calls this renames it when ``run`` has returned.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from impasto.fetch.client import Answer, Client, Token
from impasto.fetch.failure import FetchFailed, Reason
from impasto.fetch.guard import Clock
from impasto.fetch.pairs import Beside

START: Final = 512  # bytes that tell what kind of file it is
SHA256: Final = re.compile(r"[0-9a-f]{64}")
_RANGE: Final = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)")


class Kind(Protocol):
    """The kind of file that is wanted."""

    @property
    def suffix(self) -> str:
        """Ending of the names on disk, such as ``.safetensors``."""

    def begins(self, start: bytes) -> bool:
        """Whether the first ``START`` bytes can be such a file's; saves fetching the rest."""

    def check(self, path: Path) -> None:
        """Raise ``FetchFailed`` unless the file is whole and of this kind; it may also be only the start of another."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a file's bytes are.

    Attributes:
        url: Where to GET it.
        note: What it is, for people: repository, file and commit. Holds no secret.
        sha256: Of the bytes, 64 hexadecimal digits, where the site says so.
        size: In bytes, where the site says so.
        token: For a site that knows us.
        beside: A small file that readers look for beside it, where there is one.
    """

    url: str
    note: str
    sha256: str | None = None
    size: int | None = None
    token: Token | None = None
    beside: Beside | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    """A whole file in the part file."""

    sha256: str
    etag: str | None


class Transfer:
    """One download into a part file, which the next try goes on with."""

    def __init__(
        self, client: Client, kind: Kind, part: Path, max_bytes: int, make_room: Callable[[int], None]
    ) -> None:
        self.part = part
        self._client = client
        self._kind = kind
        self._max_bytes = max_bytes
        self._make_room = make_room
        self._stated: str | None = None  # hash of the whole file, where an earlier try was told it
        self._state = part.with_name(part.name.partition(".")[0] + ".json")

    def run(self, remote: Remote, known_etag: str | None, clock: Clock) -> Arrived | None:
        """Fetch what is missing; return ``None`` if the site says that ``known_etag`` is still right.

        Raises:
            FetchFailed: With reason ``broken``, another try may go on where this one ended.
        """
        if remote.size is not None and remote.size > self._max_bytes:
            raise FetchFailed("too_large", f"has {remote.size / 1e6:.4g} MB, over the limit here: give a smaller file")
        have, etag = self._resumable(remote)
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and etag:
            headers["If-Range"] = etag
        elif known_etag and not have:
            headers["If-None-Match"] = known_etag
        try:
            return self._fetch(remote, have, headers, clock)
        except OSError:  # a full disk, say: what lies there would only keep it full
            self.forget()
            raise
        except FetchFailed as failure:
            if failure.reason == "too_large":
                self.forget()
            raise

    def _fetch(self, remote: Remote, have: int, headers: dict[str, str], clock: Clock) -> Arrived | None:
        with self._client.open(
            remote.url, clock, max_bytes=self._max_bytes, headers=headers, token=remote.token
        ) as answer:
            match answer.status:
                case 304 if "If-None-Match" in headers:
                    return None
                case 206 if have and _starts_at(answer, have):
                    return self._receive(answer, remote, have)
                case 200:
                    return self._receive(answer, remote, 0)
                case 206 | 416:
                    self.forget()
                    raise FetchFailed("broken", "was answered with another part than asked for: try again")
                case _:
                    raise answer.failure()

    def forget(self) -> None:
        """Delete what has come so far."""
        self.part.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def _resumable(self, remote: Remote) -> tuple[int, str | None]:
        """Return how many bytes are here of the very same file, and the ETag they came under.

        Without an ETag they count where a hash is known that tells in the end whether the two parts fit.
        """
        self._stated = remote.sha256
        try:
            state = json.loads(self._state.read_bytes())
            size = self.part.stat().st_size
            etag, stated, same_url = state["etag"], state["sha256"], state["url"] == remote.url
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None
        if not same_url or not (etag or stated) or remote.sha256 not in (None, stated):
            return 0, None
        self._stated = stated
        return size, etag

    def _receive(self, answer: Answer, remote: Remote, have: int) -> Arrived:
        etag = _strong(answer)
        stated = remote.sha256 or _linked_sha256(answer) or (self._stated if have else None)
        expected = None if answer.length is None else answer.length + have
        self._make_room(answer.length or 0)
        write_json(self._state, {"url": remote.url, "etag": etag, "sha256": stated})
        digest = hashlib.sha256()
        with self.part.open("r+b" if have else "wb") as file:
            _feed(digest, file, have)
            size = self._copy(answer, file, digest, have)
            file.flush()
            os.fsync(file.fileno())
        if size < max(filter(None, (remote.size, expected)), default=0):
            raise FetchFailed("broken", "broke off before its end: try again")
        if stated not in (None, digest.hexdigest()) or (remote.size or size) != size:
            self.forget()
            reason: Reason = "broken" if have else "mismatch"  # what was resumed is fetched once more from its start
            raise FetchFailed(reason, "arrived with other bytes than its site states (sha256): try again later")
        try:
            self._kind.check(self.part)
        except FetchFailed:
            self.forget()
            raise
        return Arrived(digest.hexdigest(), etag)

    def _copy(self, answer: Answer, file: BinaryIO, digest: Any, have: int) -> int:
        """Write the body behind what is there; return the file's size."""
        size, start, looked = have, b"", have >= START
        for chunk in answer.chunks():
            size += len(chunk)
            if size > self._max_bytes:
                raise FetchFailed("too_large", f"is over the limit of {self._max_bytes / 1e6:.4g} MB")
            digest.update(chunk)
            file.write(chunk)
            if not looked:
                start += chunk
                looked = len(start) >= START
                if looked and not have and not self._kind.begins(start[:START]):
                    file.flush()
                    self._refuse()
        return size

    def _refuse(self) -> None:
        try:
            self._kind.check(self.part)
        finally:
            self.forget()
        raise FetchFailed("content", "is not a file of the kind that is wanted here")


def _starts_at(answer: Answer, have: int) -> bool:
    match = _RANGE.fullmatch(answer.headers.get("content-range", ""))
    return match is not None and int(match[1]) == have


def _strong(answer: Answer) -> str | None:
    """Return the ETag, where it stands for the very bytes."""
    etag = answer.headers.get("etag", "")
    return etag if etag.startswith('"') and len(etag) < 300 else None


def _linked_sha256(answer: Answer) -> str | None:
    """Return the hash that a hub states of a large file before it redirects to the file's store."""
    stated = answer.first_headers.get("x-linked-etag", "").strip('"').lower()
    return stated if SHA256.fullmatch(stated) else None


def _feed(digest: Any, file: BinaryIO, count: int) -> None:
    """Hash the first ``count`` bytes and go behind them."""
    while count:
        block = file.read(min(count, 2**20))
        digest.update(block)
        count -= len(block)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old text or the new one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content))
    os.replace(draft, path)
