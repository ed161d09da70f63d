"""Pictures as files, finished ones and start pictures: written once, under names that nobody can guess.

Knows bytes, names, and local disks and S3. Knows nothing of jobs' rows, of images or of URLs.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from obstore.store import LocalStore, ObjectStore, from_url

from impasto.errors import NotFound

EXTENSIONS: Final = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_CONTENT_TYPES: Final = {extension: content_type for content_type, extension in EXTENSIONS.items()}
_BLOB: Final = re.compile(r"[0-9a-f]{32}/[0-9]{1,9}-[0-9a-f]{32}/[0-9]{1,3}\.(png|jpg|webp)")
_INPUT: Final = re.compile(r"inputs/[0-9a-f]{32}\.png")  # beside the jobs' folders, whose names are 32 digits


class OutputStore:
    """A folder, or a bucket (``s3://bucket/prefix``), of pictures."""

    def __init__(self, root: str) -> None:
        self._store: ObjectStore = (
            from_url(root) if "://" in root else LocalStore(Path(root).absolute(), mkdir=True, automatic_cleanup=True)
        )

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

    def delete(self, names: Iterable[str]) -> None:
        """Delete pictures by blob name or key; those already gone are fine."""
        for name in names:
            try:
                self._store.delete(_checked(name, _INPUT if name.startswith("inputs/") else _BLOB))
            except FileNotFoundError:
                continue

    def _put(self, name: str, data: bytes, content_type: str) -> None:
        # A local file has nowhere to keep a content type; its name says it.
        attributes = None if isinstance(self._store, LocalStore) else {"Content-Type": content_type}
        self._store.put(name, data, mode="create", attributes=attributes)

    def _get(self, name: str) -> bytes:
        try:
            return self._store.get(name).bytes().to_bytes()
        except FileNotFoundError:
            raise NotFound("there is no such file; it may have been deleted") from None


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
