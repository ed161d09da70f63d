"""LoRAs that the owner of a key uploaded, as files on this machine.

Knows the spellings of an upload, and that files kept in a bucket are brought here first. Knows nothing of what is in
them: the gate looks at every file before it is read.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

from impasto.config import Settings
from impasto.jobs.outputs import OutputStore
from impasto.jobs.uploads import Upload, UploadStore

# The address that the upload was answered with, whatever host it names, or its path alone.
_ADDRESS: Final = re.compile(r"(?:https?://[^?#]*)?/uploads/(?P<id>[0-9a-f]{32})\.\w+(?:[?#].*)?")


class UploadedLoras:
    """Finds uploaded LoRAs by key and name.

    Args:
        uploads: The rows.
        outputs: The files.
        folder: Where those in a bucket are brought to; each is deleted when it was not used for ``kept`` seconds.
        kept: As long as an upload is found.
    """

    def __init__(self, uploads: UploadStore, outputs: OutputStore, folder: Path, kept: float) -> None:
        self._uploads = uploads
        self._outputs = outputs
        self._folder = folder
        self._kept = kept

    @classmethod
    def of(cls, settings: Settings, database: Engine, outputs: OutputStore) -> UploadedLoras:
        """Build what the settings describe."""
        uploads = UploadStore(database, outputs, kept=settings.upload_seconds)
        return cls(uploads, outputs, settings.cache_dir / "uploads", settings.upload_seconds)

    def find(self, key_id: str, name: str) -> Path | None:
        """Return the LoRA that ``name`` is: its address, or its file name; ``None`` if the key has uploaded none.

        Raises:
            NotFound: It was deleted at this very moment.
        """
        address = _ADDRESS.fullmatch(name)
        upload = self._uploads.find_lora(key_id, address["id"] if address else name)
        return None if upload is None else self._outputs.local(upload.blob) or self._brought(upload)

    def _brought(self, upload: Upload) -> Path:
        """Copy a file out of the bucket, whole or not at all, unless that was done before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        file = self._folder / Path(upload.blob).name
        if file.exists():
            os.utime(file)
            return file
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as part:
            try:
                for chunk in self._outputs.chunks(upload.blob, 0, upload.size):
                    part.write(chunk)
                part.flush()
                Path(part.name).rename(file)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
        return file

    def _tidy(self) -> None:
        for file in self._folder.iterdir():
            try:
                if time.time() - file.stat().st_mtime > self._kept:
                    file.unlink()
            except FileNotFoundError:  # another worker was faster
                continue
