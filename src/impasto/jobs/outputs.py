"""Finished pictures as files: written once, under names that cannot be guessed, on a local disk or S3.

Knows bytes and names. Knows nothing of jobs' rows, of images or of URLs.
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
        # A local file has nowhere to keep a content type; its name says it.
        attributes = None if isinstance(self._store, LocalStore) else {"Content-Type": content_type}
        self._store.put(_checked(blob), data, mode="create", attributes=attributes)
        return blob

    def get(self, blob: str) -> bytes:
        """Return a picture's bytes.

        Raises:
            NotFound: There is none, or ``blob`` is not a blob name.
        """
        try:
            return self._store.get(_checked(blob)).bytes().to_bytes()
        except FileNotFoundError:
            raise NotFound("there is no such file; it may have been deleted") from None

    def delete(self, blobs: Iterable[str]) -> None:
        """Delete pictures; those already gone are fine."""
        for blob in blobs:
            try:
                self._store.delete(_checked(blob))
            except FileNotFoundError:
                continue


def content_type_of(blob: str) -> str:
    """Return the content type that a blob's name stands for.

    Raises:
        NotFound: ``blob`` is not a blob name.
    """
    return _CONTENT_TYPES[_checked(blob).rpartition(".")[2]]


def _checked(blob: str) -> str:
    """Let only names of our own making through, so that no text from outside becomes a path."""
    if _BLOB.fullmatch(blob) is None:
        raise NotFound("there is no such file; check the address")
    return blob
