"""The header of a safetensors file: names, dtypes and shapes of its tensors, read without loading any.

Knows the file format, and what else is often saved under its name. Knows no models and imports no torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from impasto.errors import ModelError

SUFFIXES = (".safetensors", ".sft")
MAX_HEADER = 100_000_000  # bytes; the format's own limit
_LENGTH = struct.Struct("<Q")
_PROBE = 512  # bytes that tell what a file is instead

# First bytes of what is not safetensors, and the words for it.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the file it stands for; fetch the file itself (git lfs pull)"),
    (b"<!doctype html", "an HTML page; the download needs the file's own link, or a login"),
    (b"<html", "an HTML page; the download needs the file's own link, or a login"),
    (b"{", "JSON text, such as an error that a server answered; fetch the file again"),
    (b"pk\x03\x04", "a pickle in a zip (PyTorch's format), which could run anything; convert it to safetensors"),
    (b"\x80", "a pickle, which could run anything; convert it to safetensors"),
    (b"gguf", "a GGUF file; give a .safetensors file"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor: dtype in the format's words (``BF16``) and shape."""

    dtype: str
    shape: tuple[int, ...]


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
    start = file.read(_PROBE)
    if not start:
        raise ModelError(f"model {name!r} is an empty file; fetch it again")
    length = _LENGTH.unpack(start[:8])[0] if len(start) >= _LENGTH.size else 0
    if start[8:9] != b"{" or length > MAX_HEADER:
        raise ModelError(f"model {name!r} is {_named(start)}")
    file.seek(_LENGTH.size)
    entries = _entries(file.read(length), name) if _LENGTH.size + length <= size else {}
    end = _LENGTH.size + length + max(_ends(entries, name), default=0)
    if size < end:
        raise ModelError(f"model {name!r} is cut short: {size} of at least {end} bytes are there; fetch it again")
    return {key: TensorInfo(entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()}


def _named(start: bytes) -> str:
    text = start.lstrip().lower()
    return next((kind for magic, kind in _OTHERS if text.startswith(magic)), "not a safetensors file; fetch it again")


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
