"""What this server takes before it is full: limits for every key, and free space on its disks.

Knows settings and disks. How limits of keys are kept stands in ``jobs/limits.py``; memory for bodies in ``room.py``.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from obstore.exceptions import BaseError as StorageError
from sqlalchemy import make_url

from impasto.config import Settings
from impasto.errors import Unavailable
from impasto.jobs.limits import Limits

DISK_SECONDS: Final = 60  # a guess: somebody has to make room, or pictures expire
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def limits_of(settings: Settings) -> Limits:
    """Return what the settings let a key do that has no limits of its own."""
    return Limits(
        rate=settings.rate_per_minute,
        running=settings.max_running,
        daily=settings.daily_pictures,
        waiting=settings.max_waiting,
    )


class DiskRoom:
    """The disks that jobs and files need room on.

    Args:
        least: Bytes that must stay free.
        folders: On each of the disks; they need not be there yet.
    """

    def __init__(self, least: int, *folders: Path) -> None:
        self._least = least
        self._folders = folders

    @classmethod
    def of(cls, settings: Settings) -> DiskRoom:
        """Build the one that the settings describe: the data folder, and pictures and SQLite's file if elsewhere."""
        folders = [settings.data_dir.resolve()]
        if "://" not in settings.output_root:
            folders.append(Path(settings.output_root))
        database = make_url(settings.database)
        if database.get_backend_name() == "sqlite" and database.database:
            folders.append(Path(database.database).resolve().parent)
        return cls(settings.min_free_bytes, *dict.fromkeys(folders))

    def check(self, more: int = 0) -> None:
        """Do nothing if ``more`` bytes have room; it takes microseconds.

        Raises:
            Unavailable: They have none.
        """
        for folder in self._folders:
            there = next(path for path in (folder, *folder.parents) if path.exists())
            if shutil.disk_usage(there).free - more < self._least:
                raise _no_room()


@contextmanager
def storing() -> Iterator[None]:
    """Write files in the block; a disk that fills up all the same, or a bucket that is away, means "try again later".

    Raises:
        Unavailable: A file could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room() from error
        raise
    except StorageError as error:
        raise Unavailable("files cannot be stored now; send it again in a while", DISK_SECONDS) from error


def _no_room() -> Unavailable:
    return Unavailable("this server's disk is full, and it takes nothing more; send it again in a while", DISK_SECONDS)
