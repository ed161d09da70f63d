"""What was read or made ready lately, kept in memory within a budget of bytes; and LoRA files by what they are now.

Knows sizes and the order of use. Knows no formulas and no weights.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from impasto.errors import LoraError
from impasto.lora.contents import LoraContents
from impasto.lora.patch import Patch

ITEM_BYTES = 1024  # for the objects about a tensor, so that very many small ones are bounded too

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """Values by key; when they grow over the budget the ones used longest ago are dropped. Any thread may use it.

    Args:
        budget: Bytes of all values together. A value larger than that is not kept at all.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0  # of all values, as told

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> Value | None:
        """Return the value, which now counts as used, or ``None``."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keep a value of ``size`` bytes in place of what the key had."""
        with self._lock:
            self._drop(key)
            if size > self._budget:
                return
            while self.bytes + size > self._budget:
                self._drop(next(iter(self._held)))
            self._held[key] = (value, size)
            self.bytes += size

    def take(self, key: Key) -> Value | None:
        """Return the value and let go of it."""
        with self._lock:
            held = self._held.get(key)
            self._drop(key)
            return None if held is None else held[0]

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._held.clear()
            self.bytes = 0

    def _drop(self, key: Key) -> None:
        if key in self._held:
            self.bytes -= self._held.pop(key)[1]


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as it was when somebody looked: another file under the same name is another state."""

    path: Path
    modified: int  # nanoseconds since 1970
    size: int  # bytes

    @classmethod
    def now(cls, path: Path) -> FileState:
        """Look at a file.

        Raises:
            OSError: There is no such file.
        """
        stat = path.stat()
        return cls(path.absolute(), stat.st_mtime_ns, stat.st_size)


@dataclass(slots=True, eq=False)
class _Reading:
    """A file that a thread reads, for all that want it."""

    ended: threading.Event = field(default_factory=threading.Event)
    contents: LoraContents | None = None  # once it has ended; None then: it failed


class ParsedFiles:
    """LoRA files as patches, read once for as long as the budget holds them.

    Any thread may ask. Those that want one file read it once between them; nobody waits for a file of others.

    Args:
        read: Reads a file; its second argument is the request field to name in errors.
        budget: Bytes that are kept.
    """

    def __init__(self, read: Callable[[Path, str], LoraContents], budget: int) -> None:
        self._read = read
        self._cache: ByteCache[FileState, LoraContents] = ByteCache(budget)
        self._reading: dict[FileState, _Reading] = {}
        self._lock = threading.Lock()  # guards ``_reading``; never held while a file is read
        self._waiting = 0

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self._cache.bytes

    @property
    def awaited(self) -> bool:
        """Whether a thread waits for what another one reads."""
        return self._waiting > 0

    def holds(self, file: FileState) -> bool:
        """Whether a file need not be read."""
        return self._cache.get(file) is not None

    def contents(self, file: FileState, field: str) -> LoraContents:
        """Return the patches of a file.

        Raises:
            LoraError: It cannot be read, or is not what it was when the request came.
        """
        while True:
            with self._lock:
                known = self._cache.get(file)
                if known is not None:
                    return known
                others = self._reading.get(file)
                if others is None:
                    mine = self._reading[file] = _Reading()
            if others is None:
                return self._read_for_all(file, field, mine)
            self._wait(others)
            if others.contents is not None:
                return others.contents
            # They failed; it is tried again, so that the error names the field of whoever asks.

    def _read_for_all(self, file: FileState, field: str, reading: _Reading) -> LoraContents:
        """Read a file, keep it, and hand it to those who wait for it."""
        try:
            _check_unchanged(file, field)
            contents = self._read(file.path, field)
            _check_unchanged(file, field)  # it may be half of one and half of another
            self._cache.put(file, contents, contents_bytes(contents))
            reading.contents = contents
            return contents
        finally:
            with self._lock:
                del self._reading[file]
            reading.ended.set()

    def _wait(self, reading: _Reading) -> None:
        with self._lock:
            self._waiting += 1
        try:
            reading.ended.wait()
        finally:
            with self._lock:
                self._waiting -= 1

    def clear(self) -> None:
        """Forget every file."""
        self._cache.clear()


def _check_unchanged(file: FileState, field: str) -> None:
    try:
        if FileState.now(file.path) == file:
            return
    except OSError:
        pass
    raise LoraError(field, f"changed while the request waited: send it again to use {file.path.name!r} as it is")


def contents_bytes(contents: LoraContents) -> int:
    """Bytes that a file takes in memory: tensors, and text that its author chose the length of."""
    text = (*contents.metadata, *contents.metadata.values(), *contents.unmatched, *contents.ignored)
    modules = (mismatch.module for mismatch in contents.mismatched)
    words = sum(map(len, (*text, *modules, *contents.trigger_words)))
    bundles = sum(ITEM_BYTES + bundle.nbytes for bundle in contents.bundles)
    return words + bundles + sum(ITEM_BYTES + patch_bytes(patch) for patch in contents.patches.values())


def patch_bytes(patch: Patch) -> int:
    """Bytes of a patch's tensors, wherever in it they are."""
    return sum(tensor.nbytes for tensor in _tensors(patch))


def patch_on(patch: Patch, device: torch.device) -> Patch:
    """Return the patch with its tensors on a device, the same patch if they are there."""
    if all(tensor.device == device for tensor in _tensors(patch)):
        return patch
    moved: Patch = _moved(patch, device)
    return moved


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value
