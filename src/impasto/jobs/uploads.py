"""Files that clients send ahead of a request: announced by a ticket or sent at once, kept for some days.

Knows rows, quotas, tickets and which file belongs to which row. Knows nothing of HTTP or of what is in a file.

The id in a file's address is its secret, so whoever has the address may read it. A ticket is another secret: it lets
one file come in, once, without a key.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, Engine

from impasto.errors import NotFound, TooManyRequests
from impasto.jobs.database import reading, writing
from impasto.jobs.limits import NO_LIMITS, Account, Limits, count_request
from impasto.jobs.outputs import LORA_TYPE, OutputStore
from impasto.jobs.queries import queries

TICKET_SECONDS: Final = 3600.0  # in which an announced file may come
GRACE_SECONDS: Final = 3600.0  # between "nobody finds it any more" and its deletion, for whoever found it before
RETRY_SECONDS: Final = 3600  # a guess: a quota is free again when files grow old
_BATCH: Final = 200  # rows looked at in one go


@dataclass(frozen=True, slots=True)
class Ticket:
    """An announced file that has not come.

    Attributes:
        id: Of the upload, the secret of its address.
        key_id: Whose it is.
        filename: As the client named it; never part of a path.
        size: Bytes announced; 0 is "not said".
    """

    id: str
    key_id: str
    filename: str
    size: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that came."""

    id: str  # the secret of its address
    key_id: str
    filename: str  # as the client named it; never part of a path
    blob: str  # name in the ``OutputStore``
    content_type: str  # found in the bytes
    size: int  # bytes

    @classmethod
    def from_row(cls, row: Mapping[Any, Any]) -> Upload:
        """Build an upload from a row of ``uploads`` that has a file."""
        return cls(**{name: row[name] for name in cls.__slots__})


class UploadStore:
    """The uploads of one database. Every method raises ``Unavailable`` when the database cannot answer.

    Args:
        engine: The database.
        outputs: Where the files are.
        kept: Seconds that a file is found after it was announced or sent.
        quota: Bytes that the files of one key may take together; without one, no limit.
        limits: How many requests a minute a key may send, where it has no number of its own.
    """

    def __init__(
        self,
        engine: Engine,
        outputs: OutputStore,
        *,
        kept: float,
        quota: int | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)
        self._outputs = outputs
        self._kept = kept
        self._quota = quota
        self._limits = limits

    def announce(self, key_id: str, filename: str, size: int) -> tuple[Ticket, str]:
        """Make a ticket; return it and the secret that lets the file come in.

        Raises:
            TooManyRequests: The key's files take too much space, or it sends too many.
            Unauthorized: The key was revoked or has expired.
        """
        secret = secrets.token_hex(32)
        with writing(self._engine) as db:
            count_request(db, self._queries, key_id, self._limits)
            self._check_quota(db, key_id, size)
            return self._insert(db, key_id, filename, size, secret), secret

    def ticket(self, secret: str) -> Ticket:
        """Return the announced file that a secret is for.

        Raises:
            NotFound: The secret is unknown, was used, or is too old.
        """
        values = {"ticket_hash": _hash(secret), "ticket_life": _milliseconds(TICKET_SECONDS)}
        with reading(self._engine) as db:
            row = self._run(db, "find_ticket", **values).mappings().first()
        if row is None:
            raise _no_ticket()
        return Ticket(row["id"], row["key_id"], row["filename"], int(row["size"]))

    def receive(self, ticket: Ticket, file: Path, content_type: str) -> Upload:
        """Store an announced file that came whole; of two that come at once, the first is kept.

        Raises:
            NotFound: The ticket was used meanwhile.
            TooManyRequests: As ``announce``: what is counted now is the file's own size.
        """
        blob, size = self._outputs.put_upload(file, content_type), file.stat().st_size
        try:
            with writing(self._engine) as db:
                self._check_quota(db, ticket.key_id, size - ticket.size)
                return self._received(db, ticket, blob, content_type, size)
        except BaseException:
            self._outputs.delete([blob])
            raise

    def add(self, key_id: str, filename: str, file: Path, content_type: str) -> Upload:
        """Store a file that comes without a ticket.

        Raises:
            TooManyRequests, Unauthorized: As ``announce``.
        """
        blob, size = self._outputs.put_upload(file, content_type), file.stat().st_size
        try:
            with writing(self._engine) as db:
                count_request(db, self._queries, key_id, self._limits)
                self._check_quota(db, key_id, size)
                return self._received(db, self._insert(db, key_id, filename, size), blob, content_type, size)
        except BaseException:
            self._outputs.delete([blob])
            raise

    def find(self, upload_id: str) -> Upload:
        """Return the file with this id, whoever asks.

        Raises:
            NotFound: There is none, or it is too old.
        """
        with reading(self._engine) as db:
            found = self._run(db, "find_upload", id=upload_id, kept=_milliseconds(self._kept)).mappings().first()
        if found is None:
            raise NotFound("there is no such upload; it may be too old")
        return Upload.from_row(found)

    def find_lora(self, key_id: str, name: str) -> Upload | None:
        """Return the newest LoRA of a key with this id or file name, with or without ``.safetensors``."""
        values = {"key_id": key_id, "name": name, "file": f"{name}.safetensors", "content_type": LORA_TYPE}
        with reading(self._engine) as db:
            found = self._run(db, "find_upload_of_key", **values, kept=_milliseconds(self._kept)).mappings().first()
        return None if found is None else Upload.from_row(found)

    def sweep(self) -> int:
        """Delete files that nobody finds any more, and tickets that nobody used; return how many."""
        swept = 0
        kept, ticket_life = (_milliseconds(s + GRACE_SECONDS) for s in (self._kept, TICKET_SECONDS))
        while True:
            with reading(self._engine) as db:
                rows = self._run(db, "old_uploads", kept=kept, ticket_life=ticket_life, limit=_BATCH).all()
            for row in rows:
                # The file first: a row without a file is deleted by the next sweep, a file without a row by nobody.
                self._outputs.delete([row.blob] if row.blob else [])
                with writing(self._engine) as db:
                    self._run(db, "forget_upload", id=row.id)
            swept += len(rows)
            if len(rows) < _BATCH:
                return swept

    def sweep_orphans(self, seconds: float = GRACE_SECONDS) -> int:
        """Delete files of that age which no row names, left by a crash between the two; return how many."""
        if not (found := list(self._outputs.older("uploads/", seconds))):
            return 0
        with reading(self._engine) as db:
            named = set(self._run(db, "upload_blobs").scalars())
        orphans = [name for name in found if name not in named]
        self._outputs.delete(orphans)
        return len(orphans)

    def _insert(self, db: Connection, key_id: str, filename: str, size: int, secret: str | None = None) -> Ticket:
        ticket = Ticket(secrets.token_hex(16), key_id, filename, size)
        values = {"id": ticket.id, "key_id": key_id, "filename": filename, "size": size}
        self._run(db, "announce_upload", **values, ticket_hash=None if secret is None else _hash(secret))
        return ticket

    def _received(self, db: Connection, ticket: Ticket, blob: str, content_type: str, size: int) -> Upload:
        values = {"id": ticket.id, "blob": blob, "content_type": content_type, "size": size}
        row = self._run(db, "receive_upload", **values).mappings().first()
        if row is None:
            raise _no_ticket()
        return Upload.from_row(row)

    def _check_quota(self, db: Connection, key_id: str, more: int) -> None:
        """Refuse ``more`` bytes past the quota; uploads of one key take turns, so that it holds."""
        Account.locked(db, self._queries, key_id)
        values = {"key_id": key_id, "ticket_life": _milliseconds(TICKET_SECONDS)}
        used = int(self._run(db, "uploaded_by_key", **values).scalar_one())
        if self._quota is not None and used + more > self._quota:
            raise TooManyRequests(
                f"uploads of this key take {used} bytes and this one {more} more, of {self._quota} in all; "
                f"each is deleted {self._kept / 86400:g} days after it came",
                RETRY_SECONDS,
            )

    def _run(self, db: Connection, statement: str, **values: Any) -> CursorResult[Any]:
        return db.execute(self._queries[statement], values)


def _no_ticket() -> NotFound:
    return NotFound("no such upload, or it came already, or its hour is over; ask for another")


def _hash(secret: str) -> str:
    """Hash a secret for look-up; 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
