"""cog-sdxl's archive (``trained_model.tar``): a LoRA, the vectors of its words, and which word means which vectors.

Knows the tar format as far as it takes to find three files in it, and bounds on everything. Nothing is unpacked and no
name in an archive becomes a path: the files are read where they lie. Python's own ``tarfile`` has no bound on the
headers that it reads into memory. Imports no torch.

Sources: POSIX.1-2001 (pax), "ustar Interchange Format"; cog-sdxl's ``train.py`` and ``TokenEmbeddingsHandler``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

LORA: Final = "lora.safetensors"
VECTORS: Final = "embeddings.pti"  # safetensors, whatever its name
WORDS: Final = "special_params.json"
TABLES: Final = {"clip_l": "text_encoders_0", "clip_g": "text_encoders_1"}  # of the vectors, a row for each <s0>, <s1>

BLOCK: Final = 512  # bytes
MAX_ENTRIES: Final = 256  # with those that only describe another
MAX_NOTES: Final = 2**16  # bytes of one of those
MAX_WORDS_FILE: Final = 2**16  # bytes
MAX_WORDS: Final = 32
MAX_WORD: Final = 100  # characters
_MAGIC: Final = slice(257, 262)
_FILES, _NOTES, _FOLDER = (b"0", b"\0"), (b"x", b"g"), b"5"
# What in a description would change which bytes an entry is.
_DECISIVE: Final = re.compile(rb"(?:^|\n)\d+ (?:path|size|linkpath|GNU\.sparse)")
_TOKENS: Final = re.compile(r"(?:<s\d{1,3}>)+")


class ArchiveError(ValueError):
    """The archive is not what cog-sdxl writes; the message says why, as what follows ``since``."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file in the archive: where it begins and how long it is, in bytes."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class CogArchive:
    """What is in an archive.

    Attributes:
        lora: The LoRA.
        vectors: The tables of vectors; ``None``: it has no words.
        words: Word -> rows of the tables.
    """

    lora: Part
    vectors: Part | None = None
    words: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the key that each word's vectors have in a LoRA file, with their table and rows."""
        return {
            f"bundle_emb.{word}.{part}": (table, rows)
            for word, rows in self.words.items()
            for part, table in TABLES.items()
        }


def is_archive(start: bytes) -> bool:
    """Whether a file that begins so, with 262 bytes or more, is a tar."""
    return start[_MAGIC] == b"ustar"


def read_archive(file: BinaryIO, size: int) -> CogArchive:
    """Find the parts of an archive of ``size`` bytes.

    Raises:
        ArchiveError: It is broken, has anything but files and folders in it, or is not cog-sdxl's.
        OSError: It cannot be read.
    """
    parts = _parts(file, size)
    if LORA not in parts:
        whole = " but unet.safetensors, a whole model" if "unet.safetensors" in parts else ""
        raise ArchiveError(f"it has no {LORA} in it{whole}")
    if VECTORS not in parts:
        return CogArchive(parts[LORA])
    return CogArchive(parts[LORA], parts[VECTORS], _words(file, parts.get(WORDS)))


def _parts(file: BinaryIO, size: int) -> dict[str, Part]:
    """Return the files at the top of the archive by name."""
    parts: dict[str, Part] = {}
    at = 0
    for _ in range(MAX_ENTRIES):
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise ArchiveError("it is cut short")
        if not any(header):
            return parts
        name, kind, part = _entry(header, at)
        if part.start + part.size > size:
            raise ArchiveError("it is cut short")
        if kind in _NOTES:
            _check_notes(file, part)
        elif kind in _FILES:
            if name in parts:
                raise ArchiveError(f"it has two files of the name {name[:MAX_WORD]!r}")
            parts[name] = part
        elif kind != _FOLDER:
            raise ArchiveError(f"it has something in it that is no file: {name[:MAX_WORD]!r}")
        at = part.start + -(-part.size // BLOCK) * BLOCK
    raise ArchiveError(f"it has more than {MAX_ENTRIES} entries")


def _entry(header: bytes, at: int) -> tuple[str, bytes, Part]:
    """Read one header: name, kind and where the bytes are."""
    blank = header[:148] + b" " * 8 + header[156:]
    if not is_archive(header) or _octal(header[148:156]) != sum(blank):
        raise ArchiveError("it is broken")
    name = header[:100].partition(b"\0")[0]
    if header[262:263] == b"\0" and header[345] != 0:  # ustar's own; GNU's has other things there
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return (
        name.decode("utf-8", "replace").removeprefix("./"),
        header[156:157],
        Part(at + BLOCK, _octal(header[124:136])),
    )


def _octal(text: bytes) -> int:
    digits = text.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,12}", digits):
        raise ArchiveError("it is broken")
    return int(digits, 8)


def _check_notes(file: BinaryIO, part: Part) -> None:
    """Refuse a description that makes an entry other than its own header says."""
    notes = file.read(part.size) if part.size <= MAX_NOTES else None
    if notes is None or _DECISIVE.search(notes):
        raise ArchiveError("it has names or sizes in it that are not plain")


def _words(file: BinaryIO, part: Part | None) -> dict[str, tuple[int, ...]]:
    """Return what each word means: ``{"TOK": "<s0><s1>"}``; its tokens are words, too."""
    if part is None:
        return {}
    try:
        if part.size > MAX_WORDS_FILE:
            raise ValueError
        file.seek(part.start)
        meanings: Any = json.loads(file.read(part.size))
        if not isinstance(meanings, dict) or len(meanings) > MAX_WORDS:
            raise ValueError
        words = {word: _rows(word, meaning) for word, meaning in meanings.items()}
    except (ValueError, RecursionError):
        raise ArchiveError(f'its {WORDS} is not like {{"TOK": "<s0><s1>"}}') from None
    return {f"<s{row}>": (row,) for row in sorted({row for rows in words.values() for row in rows})} | words


def _rows(word: str, meaning: Any) -> tuple[int, ...]:
    if not isinstance(meaning, str) or not _TOKENS.fullmatch(meaning):
        raise ValueError
    if not word.strip() or not word.isprintable() or len(word) > MAX_WORD:
        raise ValueError
    return tuple(map(int, re.findall(r"\d+", meaning)))
