"""The header of a checkpoint: names, dtypes and shapes of its tensors, read without loading any.

Knows what a checkpoint's header must be. Knows no models and imports no torch; the format's words, and what else is
saved under its name, are in ``tensorfile``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from impasto.errors import ModelError
from impasto.tensorfile import LENGTH, PROBE, TensorInfo, named

SUFFIXES = (".safetensors", ".sft")
MAX_HEADER = 100_000_000  # bytes; the format's own limit

Header = dict[str, TensorInfo]


def read_header(path: Path, name: str) -> Header:
    """Read the header of a safetensors file; the user called it ``name``.

    Raises:
        ModelError: The file is a pickle, cut short, or something else altogether; the message says what.

    Source: the safetensors format, https://huggingface.co/docs/safetensors (8 bytes of length, JSON, data).
    """
    if path.suffix.lower() not in SUFFIXES:
        what = f"a pickle ({path.suffix})" if path.suffix else "a file of unknown kind"
        raise ModelError(
            f"model {name!r} is {what}: only .safetensors checkpoints are loaded; a pickle could run anything"
        )
    try:
        with path.open("rb") as file:
            return _checked(file, path.stat().st_size, name)
    except OSError as error:
        raise ModelError(f"model {name!r} cannot be read: {error.strerror}") from None


def _checked(file: BinaryIO, size: int, name: str) -> Header:
    start = file.read(PROBE)
    if not start:
        raise ModelError(f"model {name!r} is an empty file; fetch it again")
    length = LENGTH.unpack(start[:8])[0] if len(start) >= LENGTH.size else 0
    if start[8:9] != b"{" or length > MAX_HEADER:
        raise ModelError(f"model {name!r} is {named(start)}")
    file.seek(LENGTH.size)
    entries = _entries(file.read(length), name) if LENGTH.size + length <= size else {}
    end = LENGTH.size + length + max(_ends(entries, name), default=0)
    if size < end:
        raise ModelError(f"model {name!r} is cut short: {size} of at least {end} bytes are there; fetch it again")
    return {key: TensorInfo(entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()}


def _entries(raw: bytes, name: str) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise ModelError(f"model {name!r} has a broken safetensors header; fetch it again")
    entries.pop("__metadata__", None)
    return entries


def _ends(entries: dict[str, dict[str, Any]], name: str) -> Iterator[int]:
    """Where each tensor's data end, counted from the end of the header, in bytes."""
    for key, entry in entries.items():
        match entry:
            case {"dtype": str(), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                0 <= begin <= end and all(isinstance(side, int) and side >= 0 for side in shape)
            ):
                yield end
            case _:
                raise ModelError(f"model {name!r} has a broken safetensors header at {key[:100]!r}; fetch it again")
