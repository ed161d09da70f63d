"""Files: finished pictures, start pictures, and what clients upload; written once, under names nobody can guess.

Knows bytes, names, and local disks and S3. Knows nothing of jobs' rows, of images or of URLs.

::

    <job>/<attempt>-<secret>/<index>.png   finished pictures
    inputs/<secret>.png                    start pictures and masks, encoded anew
    uploads/<secret>.<extension>           what clients sent, as they sent it
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from impasto.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from obstore import Attributes

_PICTURES: Final = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
EXTENSIONS: Final = _PICTURES | {"video/webm": "webm"}  # of what jobs make
LORA_TYPE: Final = "application/octet-stream"  # of .safetensors files: no type is registered for them
UPLOAD_EXTENSIONS: Final = _PICTURES | {
    "image/gif": "gif",
    "image/bmp": "bmp",
    LORA_TYPE: "safetensors",
}
RETRIES: Final = 3  # of one request to a bucket; whoever wants a file has patience of its own
RETRY_SECONDS: Final = 10  # for all of them
PROBE_BYTES: Final = 2**20
CHUNK_BYTES: Final = 2**20  # of a large file, in memory at once
_CONTENT_TYPES: Final = {extension: content_type for content_type, extension in EXTENSIONS.items()}
_BLOB: Final = re.compile(r"[0-9a-f]{32}/[0-9]{1,9}-[0-9a-f]{32}/[0-9]{1,3}\.(png|jpg|webp|webm)")
_INPUT: Final = re.compile(r"inputs/[0-9a-f]{32}\.png")  # beside the jobs' folders, whose names are 32 digits
_UPLOAD: Final = re.compile(r"uploads/[0-9a-f]{32}\.(png|jpg|webp|gif|bmp|safetensors)")
_SHELF: Final = re.compile(r"inputs/|uploads/|[0-9a-f]{32}/")
_FORMS: Final = {"inputs": _INPUT, "uploads": _UPLOAD}  # by first part; other names are those of finished pictures


class OutputStore:
    """A folder, or a bucket (``s3://bucket/prefix``), of files.

    Every method raises ``Unavailable`` when files cannot be stored or read now: a full disk, a bucket that is away or
    refuses us.
    """

    def __init__(self, root: str) -> None:
        self._store = _open(root)

    def put(self, job_id: str, attempt: int, index: int, data: bytes, content_type: str) -> str:
        """Write one picture and return its blob name; what is written is never written over.

        Args:
            job_id: 32 hexadecimal digits.
            attempt: The lease's attempt.
            index: Position among the job's pictures, 0-based.
            data: The encoded picture.
            content_type: One of ``EXTENSIONS``.
        """
        blob = f"{job_id}/{attempt}-{secrets.token_hex(16)}/{index}.{EXTENSIONS[content_type]}"
        self._put(_checked(blob), data, content_type)
        return blob

    def put_input(self, data: bytes) -> str:
        """Write one start picture or mask, a PNG of our own making, and return its key.

        A key is no blob name: ``get`` and ``content_type_of`` refuse it, so no route serves what was sent in.
        """
        key = f"inputs/{secrets.token_hex(16)}.png"
        self._put(key, data, "image/png")
        return key

    def put_upload(self, file: Path, content_type: str) -> str:
        """Store a file that a client sent, a part at a time, and return its name.

        Nobody finds a name without being told, so a file that is cut short by a crash is never read.

        Args:
            file: The file, here.
            content_type: One of ``UPLOAD_EXTENSIONS``.
        """
        name = f"uploads/{secrets.token_hex(16)}.{UPLOAD_EXTENSIONS[content_type]}"
        with _answering():
            self._store.put(name, file, attributes=self._attributes(content_type))
        return name

    def probe(self) -> None:
        """Do nothing if files can be stored now: write one as large as a picture, and delete it."""
        name = f"probe/{secrets.token_hex(16)}"
        with _answering():
            try:
                self._store.put(name, bytes(PROBE_BYTES), mode="create")
            finally:
                with suppress(FileNotFoundError):
                    self._store.delete(name)

    def get(self, blob: str) -> bytes:
        """Return a picture's bytes.

        Raises:
            NotFound: There is none, or ``blob`` is not a blob name.
        """
        return self._get(_checked(blob))

    def get_input(self, key: str) -> bytes:
        """Return what ``put_input`` wrote.

        Raises:
            NotFound: It is gone, or ``key`` is not one of its keys.
        """
        return self._get(_checked(key, _INPUT))

    def get_upload(self, name: str) -> bytes:
        """Return the bytes of what ``put_upload`` stored.

        Raises:
            NotFound: It is gone, or ``name`` is not one of its names.
        """
        return self._get(_checked(name, _UPLOAD))

    def size(self, name: str) -> int:
        """Return the bytes in a file of any kind.

        Raises:
            NotFound: There is none, or ``name`` is none of ours.
        """
        try:
            with _answering():
                return int(self._store.head(_checked(name, _form(name)))["size"])
        except FileNotFoundError:
            raise _gone() from None

    def chunks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` up to ``end`` of a file of any kind, at most ``CHUNK_BYTES`` at a time.

        Raises:
            NotFound: There is none, or ``name`` is none of ours.
        """
        _checked(name, _form(name))
        for at in range(start, end, CHUNK_BYTES):
            try:
                with _answering():
                    part = self._store.get_range(name, start=at, end=min(at + CHUNK_BYTES, end)).to_bytes()
                yield part
            except FileNotFoundError:
                raise _gone() from None

    def local(self, name: str) -> Path | None:
        """Return where a file of any kind is on this machine, or ``None`` where files are kept in a bucket."""
        prefix = getattr(self._store, "prefix", None)
        if not isinstance(self._store, LocalStore) or prefix is None:
            return None
        return Path(prefix) / _checked(name, _form(name))

    def older(self, shelf: str, seconds: float) -> Iterator[str]:
        """Yield the names of files that were written at least so many seconds ago.

        Args:
            shelf: ``"inputs/"``, ``"uploads/"``, or a job's id with a slash.
            seconds: Their least age, by the clock of the disk or bucket.
        """
        before = datetime.now(UTC) - timedelta(seconds=seconds)
        with _answering():
            parts = list(self._store.list(_checked(shelf, _SHELF)))
        for part in parts:
            for found in part:
                if found["last_modified"] <= before and _form(found["path"]).fullmatch(found["path"]):
                    yield found["path"]

    def delete(self, names: Iterable[str]) -> None:
        """Delete files of any kind by name; those already gone are fine."""
        for name in names:
            with _answering(), suppress(FileNotFoundError):
                self._store.delete(_checked(name, _form(name)))

    def _put(self, name: str, data: bytes, content_type: str) -> None:
        with _answering():
            self._store.put(name, data, mode="create", attributes=self._attributes(content_type))

    def _attributes(self, content_type: str) -> Attributes | None:
        """Say the type to a bucket; a local file has nowhere to keep it, and its name says it."""
        return None if isinstance(self._store, LocalStore) else {"Content-Type": content_type}

    def _get(self, name: str) -> bytes:
        try:
            with _answering():
                return self._store.get(name).bytes().to_bytes()
        except FileNotFoundError:
            raise _gone() from None


def _open(root: str) -> ObjectStore:
    if "://" not in root:
        return LocalStore(Path(root).absolute(), mkdir=True, automatic_cleanup=True)
    return from_url(root, retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)})


@contextmanager
def _answering() -> Iterator[None]:
    """Tell files that are not there from a disk or bucket that is not; the bucket itself may be what is not found."""
    try:
        yield
    except (BaseError, OSError) as error:
        if isinstance(error, FileNotFoundError) and "<Code>NoSuchBucket</Code>" not in str(error):
            raise
        raise Unavailable("files cannot be stored or read now; try again in a few seconds") from error


def content_type_of(blob: str) -> str:
    """Return the content type that a blob's name stands for.

    Raises:
        NotFound: ``blob`` is not a blob name.
    """
    return _CONTENT_TYPES[_checked(blob).rpartition(".")[2]]


def _checked(name: str, form: re.Pattern[str] = _BLOB) -> str:
    """Let only names of our own making through, so that no text from outside becomes a path."""
    if form.fullmatch(name) is None:
        raise NotFound("there is no such file; check the address")
    return name


def _form(name: str) -> re.Pattern[str]:
    return _FORMS.get(name.partition("/")[0], _BLOB)


def _gone() -> NotFound:
    return NotFound("there is no such file; it may have been deleted")
