"""A file of the cache together with the small one that readers look for beside it, under the names that they look for.

Knows folders and links. Knows no kind of file and no site. A pair is named by the hashes of both files, so two that
are equal are one, and one that is there is right.

::

    pairs/<sha256 of the file>-<sha256 of the small one>/<name>        a link to the blob
                                                        /<small name>
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from impasto.fetch.client import Token

PAIR: Final = re.compile(r"[0-9a-f]{64}-[0-9a-f]{64}")
MOST_PAIRS: Final = 1000  # one file may have stood beside many small ones
_DRAFT: Final = "draft-"


@dataclass(frozen=True, slots=True)
class Beside:
    """A small file that belongs beside another.

    Attributes:
        url: Where to GET it.
        name: What readers call it.
        of: What they then call the other.
        max_bytes: Most that it may have.
        token: For a site that knows us.
    """

    url: str
    name: str
    of: str
    max_bytes: int
    token: Token | None = None


class Pairs:
    """The pairs of a cache. Whoever makes or trims them holds the cache's lock for that."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self, blob: Path, sha256: str, beside: Beside, data: bytes) -> str:
        """Put a pair on disk, whole or not at all, and return its name.

        Args:
            blob: The file, in a folder beside that of the pairs.
            sha256: Its hash.
            beside: What the small one is.
            data: Its bytes.
        """
        name = f"{sha256}-{hashlib.sha256(data).hexdigest()}"
        if self.find(name) is None:
            draft = self._draft()
            (draft / beside.name).write_bytes(data)
            (draft / beside.of).symlink_to(Path("..", "..", blob.parent.name, blob.name))
            self._delete(self._folder / name)
            os.replace(draft, self._folder / name)
        return name

    def find(self, name: str) -> Path | None:
        """Return the pair's file, under the name that goes with its small one; ``None`` if not both are there."""
        if not PAIR.fullmatch(name):
            return None
        files = [path for path in _files(self._folder / name) if path.is_file()]
        links = [path for path in files if path.is_symlink()]
        return links[0] if len(links) == 1 and len(files) == 2 else None

    def use(self, name: str) -> None:
        """Mark a pair as used now."""
        os.utime(self._folder / name)

    def trim(self) -> None:
        """Delete the pairs whose file is gone, those beyond the bound, and what a process that died left half made."""
        found = sorted(_files(self._folder), key=lambda folder: folder.lstat().st_mtime_ns, reverse=True)
        for place, folder in enumerate(found):
            if place >= MOST_PAIRS or self.find(folder.name) is None:
                self._delete(folder)

    def _draft(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self._folder))

    def _delete(self, folder: Path) -> None:
        """Delete a pair so that nobody ever sees half of it."""
        if folder.exists():
            away = self._draft()
            os.replace(folder, away)
            shutil.rmtree(away)


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
