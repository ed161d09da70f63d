"""Files from other hosts on disk: kept once by their content, whole or not at all, within a quota.

Knows files, hashes and locks, and how a download is resumed. Knows no site's protocol and no kind of file.

::

    blobs/<sha256><suffix>   whole files; only a rename puts one here
    pairs/<sha256>-<sha256>  a file and the small one that belongs beside it (``pairs``)
    index/<key>.json         what an address last led to
    parts/<key>.part         what has come so far of a download, with <key>.json beside it
    locks/<start of key>     held by the one process that downloads; the others wait

A file that is in use is never deleted: its users hold a shared lock on it (``Held``), in any process. Nothing here
grows with the number of addresses that were ever asked for: the index and the parts are bounded, and a lock serves all
keys of one beginning.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from impasto.fetch.client import Client
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import SLICE_SECONDS, Clock, Stop, never
from impasto.fetch.pairs import Beside, Pairs
from impasto.fetch.transfer import SHA256, Kind, Remote, Transfer, write_json

TRIES: Final = 3  # of a transfer that breaks off
STALE_PART_SECONDS: Final = 7 * 86400.0  # after which nobody is going to resume it
MOST_ENTRIES: Final = 10_000  # addresses in the index
MOST_PARTS: Final = 1_000  # files of unfinished downloads
LOCK_DIGITS: Final = 3  # of a key's hexadecimal digits that choose its lock: 4,096 locks
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Locate = Callable[[Clock], Remote]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """What an address last led to."""

    sha256: str
    note: str
    url: str
    etag: str | None
    checked_at: float  # seconds since 1970
    pair: str | None = None  # name of the pair that the file is part of


class Held:
    """A file in the cache that cannot be deleted while this object lives.

    Attributes:
        path: The file.
        note: What it is, for people.
    """

    def __init__(self, path: Path, note: str, descriptor: int) -> None:
        self.path = path
        self.note = note
        self._close = weakref.finalize(self, os.close, descriptor)  # and with it the shared lock

    def __repr__(self) -> str:
        return f"Held({self.note})"

    def release(self) -> None:
        """Let it be deleted when room is needed."""
        self._close()


class Cache:
    """A folder of fetched files that any number of processes share.

    Args:
        folder: Made if it is not there.
        client: Fetches.
        kind: What is kept here.
        quota: Bytes of whole files; the least recently used go first.
        max_bytes: Largest file.
        seconds: Longest time for one file.
    """

    def __init__(
        self, folder: Path, client: Client, kind: Kind, *, quota: int, max_bytes: int, seconds: float = 600.0
    ) -> None:
        self._folder = folder
        self._pairs = Pairs(folder / "pairs")
        self._client = client
        self._kind = kind
        self._quota = quota
        self._max_bytes = min(max_bytes, quota)
        self._seconds = seconds

    def get(self, address: str, locate: Locate, *, fresh: float = 0.0, stop: Stop = never) -> Held:
        """Return the file that ``address`` leads to, from disk where that is known to be right.

        With the site away, what it last led to stands in.

        Args:
            address: Its name in the index: the same for the same file of the same site.
            locate: Asks the site where the bytes are.
            fresh: Seconds for which the site is not asked again.
            stop: Says when nobody waits for it any more.

        Raises:
            FetchFailed: The message is the rest of a sentence about the address.
        """
        key = hashlib.sha256(address.encode()).hexdigest()
        with _disk_errors():
            self._make_folders()
            held = self._known(key, fresh)
            if held is not None:
                return held
            with self._locked(key, stop):
                held = self._known(key, fresh)  # another process has just fetched it
                return held or self._asked(key, locate, Clock(self._seconds, stop))

    def _asked(self, key: str, locate: Locate, clock: Clock) -> Held:
        """Ask the site, and fetch what is not here."""
        known = self._entry(key)
        try:
            remote = locate(clock)
            small = None if remote.beside is None else self._small(remote.beside, clock)
            entry = self._refreshed(key, known, remote, clock)
        except FetchFailed as failure:
            held = self._hold(known) if known and failure.away else None
            if held is None:
                raise
            log.warning("%r is taken from the cache: its site cannot be asked (%s)", held.note, failure.reason)
            return held
        entry = self._paired(entry, remote.beside, small)
        self._write_entry(key, entry)
        held = self._hold(entry)
        if held is None:  # deleted in this very moment, by a process with another quota
            raise FetchFailed("no_space", "does not fit into the server's cache: have cache_bytes raised")
        self._trim()
        return held

    def _refreshed(self, key: str, known: Entry | None, remote: Remote, clock: Clock) -> Entry:
        now = time.time()
        if remote.sha256 and self._blob(remote.sha256).is_file():
            return Entry(remote.sha256, remote.note, remote.url, None, now)
        if known is not None and (known.url != remote.url or not self._blob(known.sha256).is_file()):
            known = None
        transfer = Transfer(self._client, self._kind, self._part(key), self._max_bytes, self._make_room)
        for left in reversed(range(TRIES)):
            try:
                arrived = transfer.run(remote, None if known is None else known.etag, clock)
                break
            except FetchFailed as failure:
                if failure.reason != "broken" or not left:
                    raise
                log.info("%r broke off; going on", remote.note)
        if arrived is None:
            assert known is not None
            return replace(known, note=remote.note, checked_at=now)
        if not self._blob(arrived.sha256).is_file():  # never in place of a file that somebody may hold
            os.replace(transfer.part, self._blob(arrived.sha256))
        transfer.forget()
        return Entry(arrived.sha256, remote.note, remote.url, arrived.etag, now)

    def _small(self, beside: Beside, clock: Clock) -> bytes:
        """Fetch a file that belongs beside another."""
        try:
            with self._client.open(beside.url, clock, max_bytes=beside.max_bytes, token=beside.token) as answer:
                if answer.status != 200:
                    raise answer.failure()
                return answer.read()
        except FetchFailed as failure:
            raise failure.of(f"comes with {beside.name}, which") from None

    def _paired(self, entry: Entry, beside: Beside | None, small: bytes | None) -> Entry:
        if beside is None or small is None:
            return replace(entry, pair=None)
        with self._trimming():  # so that no other process takes the pair for one whose file is gone
            return replace(entry, pair=self._pairs.make(self._blob(entry.sha256), entry.sha256, beside, small))

    def _known(self, key: str, fresh: float) -> Held | None:
        """Return what the address leads to, if that needs no asking."""
        entry = self._entry(key)
        if entry is None or not 0 <= time.time() - entry.checked_at < fresh:
            return None
        return self._hold(entry)

    def _hold(self, entry: Entry) -> Held | None:
        """Lock a file against deletion and mark it as used now."""
        path = self._blob(entry.sha256)
        shown = path if entry.pair is None else self._pairs.find(entry.pair)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        held = Held(shown or path, entry.note, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Used now, but not modified: readers tell a file by the time it was written.
            os.utime(path, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
            if entry.pair is not None:
                self._pairs.use(entry.pair)
            if shown is not None and os.fstat(descriptor).st_ino == path.stat().st_ino == shown.stat().st_ino:
                return held
        except OSError:  # it is just being deleted
            pass
        held.release()
        return None

    def _make_room(self, size: int) -> None:
        """Delete the least recently used files that nobody holds, until ``size`` more bytes fit.

        Raises:
            FetchFailed: The disk has no room for them.
        """
        self._trim(size)
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise FetchFailed("no_space", f"needs {size / 1e6:.4g} MB, and the server's disk has {free / 1e6:.4g} free")

    def _trim(self, wanted: int = 0) -> None:
        """Delete what was not used for longest, whole or in parts, until the quota is kept."""
        with self._trimming():
            found = [path for name in ("blobs", "parts") for path in (self._folder / name).iterdir()]
            files = [(path, stat) for path in found if (stat := _stat(path))]
            total = sum(stat.st_size for _, stat in files) + wanted
            surplus = sum(path.parent.name == "parts" for path, _ in files) - MOST_PARTS
            for path, stat in sorted(files, key=lambda file: max(file[1].st_mtime_ns, file[1].st_atime_ns)):
                part = path.parent.name == "parts"
                stale = part and (surplus > 0 or stat.st_mtime < time.time() - STALE_PART_SECONDS)
                if (total > self._quota or stale) and self._deleted(path):
                    log.info("%s deleted from the cache", path.name)
                    total -= stat.st_size
                    surplus -= part
            self._pairs.trim()
            self._trim_index()

    def _trim_index(self) -> None:
        """Forget the addresses asked for longest ago: they are asked again, and what they lead to stays."""
        entries = [(stat.st_mtime_ns, path) for path in (self._folder / "index").iterdir() if (stat := _stat(path))]
        for _, path in sorted(entries)[: -MOST_ENTRIES or None]:
            path.unlink(missing_ok=True)

    def _deleted(self, path: Path) -> bool:
        """Delete a file, unless it is held or is just being fetched."""
        if path.parent.name == "blobs":
            return _delete_unheld(path)
        try:
            with self._lock(path.name).acquire(timeout=0):
                path.unlink(missing_ok=True)
        except Timeout:
            return False
        return True

    def _entry(self, key: str) -> Entry | None:
        try:
            entry = Entry(**json.loads((self._folder / "index" / f"{key}.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        right = isinstance(entry.sha256, str) and SHA256.fullmatch(entry.sha256) and isinstance(entry.pair, str | None)
        return entry if right else None

    def _write_entry(self, key: str, entry: Entry) -> None:
        write_json(self._folder / "index" / f"{key}.json", asdict(entry))

    def _blob(self, sha256: str) -> Path:
        return self._folder / "blobs" / f"{sha256}{self._kind.suffix}"

    def _part(self, key: str) -> Path:
        return self._folder / "parts" / f"{key}.part"

    def _make_folders(self) -> None:
        for name in ("blobs", "pairs", "index", "parts", "locks"):
            (self._folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def _lock(self, key: str) -> FileLock:
        return FileLock(self._folder / "locks" / f"{key[:LOCK_DIGITS]}.lock")

    def _trimming(self) -> FileLock:
        """Return the lock of what is deleted and paired."""
        return FileLock(self._folder / "locks" / "trim.lock")

    @contextmanager
    def _locked(self, key: str, stop: Stop) -> Iterator[None]:
        """Be the only one that fetches this address, in any process."""
        lock = self._lock(key)
        clock = Clock(2 * self._seconds, stop)
        while True:
            try:
                lock.acquire(timeout=SLICE_SECONDS)
                break
            except Timeout:
                clock.left()
        try:
            yield
        finally:
            lock.release()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _delete_unheld(path: Path) -> bool:
    """Delete a file unless somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn a disk that is full or away into a failure that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            problem = "does not fit on the server's disk: have its operator make room in the cache's folder"
            raise FetchFailed("no_space", problem) from error
        log.exception("the cache's folder cannot be used")
        raise FetchFailed("no_space", "cannot be kept on the server's disk: its log has the reason") from error
