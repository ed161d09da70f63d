"""Where the tensors of a LoRA file are read from: the file itself, or the parts of cog-sdxl's archive.

Knows safetensors and where an archive's parts lie. Knows no names of modules. What it opens has passed the gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from impasto.lora.cog import CogArchive, Part
from impasto.lora.gate import Header


class Source(Protocol):
    """Tensors by key; each may be the file's own pages, which change if it is written over."""

    def get_tensor(self, key: str) -> Tensor:
        """Return one tensor."""


@contextmanager
def open_tensors(path: Path, header: Header) -> Iterator[Source]:
    """Open a file for reading.

    Args:
        path: The file.
        header: As the gate read it.

    Raises:
        SafetensorError, OSError: It is not what it was.
    """
    if header.archive is not None:
        yield _Archived(path, header.archive)
        return
    with safe_open(path, framework="pt") as file:
        yield file


class _Archived:
    """An archive's tensors, all in memory: its parts begin anywhere, and safetensors maps whole files."""

    def __init__(self, path: Path, archive: CogArchive) -> None:
        self._lora = _loaded(path, archive.lora)
        self._tables = {} if archive.vectors is None else _loaded(path, archive.vectors)
        self._rows = archive.keys()

    def get_tensor(self, key: str) -> Tensor:
        """Return one tensor; of a word, its rows of the table."""
        if key in self._lora:
            return self._lora[key]
        try:
            table, rows = self._rows[key]
            return self._tables[table][list(rows)]
        except LookupError:  # they were there when the gate looked
            raise OSError(f"{key!r} is gone") from None


def _loaded(path: Path, part: Part) -> dict[str, Tensor]:
    with path.open("rb") as file:
        file.seek(part.start)
        return load(file.read(part.size))
