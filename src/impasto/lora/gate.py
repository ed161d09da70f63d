"""The gate: what a LoRA file says of itself, checked before a tensor is read or memory for one is set aside.

Knows the safetensors header, its limits and the low-rank pairs. Knows no model, no formulas and no torch. What it lets
through costs no more memory than the file is long: every shape is backed by bytes that are there. Only an archive
(``cog``) is read whole beside its tensors, and has a bound of its own.

Source: the safetensors format, https://huggingface.co/docs/safetensors (8 bytes of length, JSON, data).
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from impasto.errors import LoraError
from impasto.lora.cog import VECTORS, ArchiveError, CogArchive, Part, is_archive, read_archive
from impasto.lora.courtesy import give_way
from impasto.tensorfile import DTYPE_BYTES, LENGTH, PROBE, TensorInfo, named

FORMAT_HEADER: Final = 100_000_000  # bytes; the format's own limit, beyond which a length is no length
MAX_KEY: Final = 256  # characters
MAX_AXES: Final = 6
SHOWN: Final = 100  # characters of a file's words repeated in an error

# The two halves of a low-rank product, in every spelling: kohya, PEFT, old and new diffusers.
_HALF: Final = re.compile(
    r"(?P<module>.*?)[._](?:lora(?:_linear_layer)?[._]|vera_)(?P<half>down|up|A|B)(?:(?:\.[\w-]+)?\.weight)?"
)
# A text of the header, and how long it is where its length no longer counts as names. One that never ends goes on to
# the end, so that no byte is looked at twice.
_TEXT: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_LONG_TEXT: Final = 1024  # letters
# All that counts as names, up to the next long text, in one step: there can be a million of them.
_NAMES: Final = re.compile(rb'(?:[^"]++|"(?:[^"\\]|\\.){0,%d}+")*+' % (_LONG_TEXT - 1), re.DOTALL)
_KEPT_TEXT: Final = 2**20  # bytes of a text that are read
_KEPT_TEXTS: Final = 8  # of that length
# As much of a text as is whole letters; two escapes can be one.
_LETTERS: Final = re.compile(
    rb'"(?:[^"\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*+'
)
_RANK_AXIS: Final = {"down": 0, "A": 0, "up": 1, "B": 1}


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What a LoRA file may be at most.

    Attributes:
        file_bytes: A LoRA of rank 256 over all of SDXL is under 2 GiB.
        archive_bytes: An archive is read whole. cog-sdxl's are of rank 32 by default, 186 MB.
        header_bytes: All of the header. kohya notes every caption of the training pictures, twice: 50,000 pictures are
            some 20 MB. A text is read up to 1 MiB, so long ones cost their length in memory, once, and no more.
        names_bytes: The header without its long texts: names, shapes, short notes. 12,000 tensors with long names fit;
            parsed into objects a byte of it takes some twenty of memory.
        tensors: SDXL has about 1,000 modules, and the kind with most tensors has 9 for each.
        rank: At 640 a low-rank pair on SDXL's widest square weights (1280) is as large as the weight itself, so
            beyond it a trainer would store the difference; 1024 leaves room for the wide feed-forward layers.
    """

    file_bytes: int = 2 * 2**30
    archive_bytes: int = 512 * 2**20
    header_bytes: int = 32 * 2**20
    names_bytes: int = 2 * 2**20
    tensors: int = 20_000
    rank: int = 1024


DEFAULTS: Final = GateLimits()


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file that passed: its tensors' dtypes and shapes by name, and its metadata.

    In a header of more than ``GateLimits.names_bytes`` texts of metadata are cut after 1 MiB. An archive's is its
    LoRA's, with the vectors of its words under the keys that they have in LoRA files.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    archive: CogArchive | None = None


def check_header(path: Path, field: str, limits: GateLimits = DEFAULTS) -> Header:
    """Read and check the header of a LoRA file; whatever the file's name, its bytes decide.

    Args:
        path: The file.
        field: Path of the request field that named it, for the error.
        limits: What it may be at most.

    Raises:
        LoraError: It is something else, broken, hostile or too large; one sentence says what it is and what to do.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise LoraError(field, "is not a file; give a .safetensors file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if is_archive(file.read(PROBE)):
                return _unpacked(file, size, field, limits)
            return _checked(file, Part(0, size), field, limits)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise LoraError(field, f"cannot be read ({getattr(error, 'strerror', None) or 'not a path'})") from None


def _unpacked(file: BinaryIO, size: int, field: str, limits: GateLimits) -> Header:
    """Check an archive's LoRA and the tables of its words' vectors."""
    if size > limits.archive_bytes:
        most = f"{limits.archive_bytes / 2**20:.3g} MiB"
        raise LoraError(
            field, f"is a packed archive of more than {most}; unpack it and give the .safetensors file in it"
        )
    try:
        archive = read_archive(file, size)
    except ArchiveError as error:
        remedy = "unpack it and give the .safetensors file in it"
        raise LoraError(field, f"is a packed archive that is not read, since {error}; {remedy}") from None
    lora = _checked(file, archive.lora, field, limits)
    if archive.vectors is None:
        return Header(lora.tensors, lora.metadata, archive)
    try:
        tables = _checked(file, archive.vectors, field, limits).tensors
    except LoraError as error:
        raise LoraError(field, f"is an archive whose {VECTORS} {error.problem}") from None
    words: dict[str, TensorInfo] = {}
    for key, (table, rows) in archive.keys().items():
        shape = tables[table].shape if table in tables else ()
        if len(shape) != 2 or max(rows) >= shape[0]:
            raise LoraError(field, f"is an archive whose {VECTORS} has not the vectors of its words; fetch it again")
        words[key] = TensorInfo(tables[table].dtype, (len(rows), shape[1]))
    return Header({**words, **lora.tensors}, lora.metadata, archive)


def _checked(file: BinaryIO, part: Part, field: str, limits: GateLimits) -> Header:
    size = part.size
    file.seek(part.start)
    start = file.read(min(PROBE, size))
    length = LENGTH.unpack(start[:8])[0] if len(start) >= LENGTH.size else 0
    if not start:
        raise LoraError(field, "is an empty file; fetch it again")
    if start[8:9] != b"{" or length > FORMAT_HEADER:
        raise LoraError(field, f"is {named(start)}")
    if size > limits.file_bytes:
        raise LoraError(field, f"is larger than {limits.file_bytes / 2**30:.3g} GiB, so it is no LoRA")
    if length > limits.header_bytes:
        most = f"{limits.header_bytes / 2**20:.3g} MiB"
        raise LoraError(
            field, f"has a header of {length / 2**20:.1f} MiB, at most {most} are taken; strip its metadata"
        )
    if LENGTH.size + length > size:
        raise LoraError(field, f"is cut short inside its header, after {size} bytes; fetch it again")
    file.seek(part.start + LENGTH.size)
    entries = _parsed(_without_long_texts(file.read(length), field, limits.names_bytes), field)
    metadata = _metadata(entries.pop("__metadata__", None), field)
    if not entries:
        raise LoraError(field, "holds no tensors; fetch it again or ask its author for another file")
    if len(entries) > limits.tensors:
        raise LoraError(field, f"holds {len(entries)} tensors, at most {limits.tensors} are taken; it is no LoRA")
    tensors = {key: _tensor(key, entry, field) for key, entry in entries.items()}
    _check_offsets(entries, size - LENGTH.size - length, field)
    _check_ranks(tensors, field, limits.rank)
    return Header(tensors, metadata)


def _without_long_texts(raw: bytes, field: str, most: int) -> bytes:
    """Cut the long texts of a long header, so that what is parsed is ``most`` bytes and a few such texts."""
    if len(raw) <= most:
        return raw
    kept: list[bytes] = []
    done = end = names = 0
    while end < len(raw) and names <= most:
        start = _end(_NAMES, raw, end, end + most + 1)
        names += start - end
        end = _end(_TEXT, raw, start)
        if end - start < _LONG_TEXT:  # cut short by what was left to look at
            names += end - start
        elif end - start > _KEPT_TEXT:
            kept += [raw[done:start], _cut(raw[start : start + _KEPT_TEXT]), b'"']
            done = end
    whole = b"".join([*kept, raw[done:]])
    if names > most or len(whole) > most + _KEPT_TEXTS * _KEPT_TEXT:
        what = f"{most / 2**20:.3g} MiB of names and short notes, or {_KEPT_TEXTS} MiB of long texts"
        raise LoraError(field, f"has a header with more than {what}; strip its metadata")
    return whole


def _end(pattern: re.Pattern[bytes], raw: bytes, start: int, stop: int | None = None) -> int:
    found = pattern.match(raw, start, len(raw) if stop is None else stop)
    return found.end() if found else start


def _cut(text: bytes) -> bytes:
    """Take the half of a letter off the end."""
    found = _LETTERS.match(text)
    return (found[0] if found else b"").decode("utf-8", "ignore").encode()


def _parsed(raw: bytes, field: str) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, _TwiceError) else "it is not the JSON that it should be"
        raise LoraError(field, f"has a broken safetensors header: {why}; fetch it again") from None
    return entries  # type: ignore[no-any-return]  # it began with a brace


class _TwiceError(ValueError):
    """A name stands twice, so readers would disagree about what it means."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if not pairs:  # there can be a million of these
        return {}
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _TwiceError(f"{_shown(twice)} stands in it twice")
    return found


def _metadata(values: Any, field: str) -> dict[str, str]:
    match values:
        case None:
            return {}
        case dict() if all(isinstance(value, str) for value in values.values()):
            return values
        case _:
            raise LoraError(field, "has metadata that are not text, which the format forbids; save it again without")


def _tensor(key: str, entry: Any, field: str) -> TensorInfo:
    """Check one tensor's name, dtype and shape; its place in the file is checked with all the others'."""
    give_way()
    if not 0 < len(key) <= MAX_KEY or not key.isprintable() or ".." in key or "\\" in key or key.startswith("/"):
        raise LoraError(
            field, f"holds a tensor with the name {_shown(key)}, which no trainer writes; do not use this file"
        )
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(entry) == 3 and all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            pass
        case _:
            raise LoraError(field, f"has a broken safetensors header at {_shown(key)}; fetch it again")
    if dtype not in DTYPE_BYTES:
        raise LoraError(field, f"holds {_shown(key)} as {dtype[:20]!r}, a format that is not read; save it as F16")
    if len(shape) > MAX_AXES:
        raise LoraError(field, f"holds {_shown(key)} with {len(shape)} axes; weights have at most {MAX_AXES}")
    if 0 in shape:
        raise LoraError(field, f"holds {_shown(key)} of the empty shape {_sizes(shape)}; do not use this file")
    if begin > end or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise LoraError(field, f"has a broken safetensors header: {_shown(key)} has not the bytes of its shape")
    return TensorInfo(dtype, tuple(shape))


def _check_offsets(entries: Mapping[str, Any], size: int, field: str) -> None:
    """Refuse data that overlap, leave holes, or do not end where the file ends; ``size`` is what follows the header."""
    end = 0
    for begin, next_end in sorted(entry["data_offsets"] for entry in entries.values()):
        if begin != end:
            problem = "overlap" if begin < end else "leave a hole"
            raise LoraError(field, f"has a broken safetensors header: its tensors {problem} at byte {min(begin, end)}")
        end = next_end
    if size < end:
        raise LoraError(field, f"is cut short: {size} of {end} bytes of its tensors are there; fetch it again")
    if size > end:
        raise LoraError(field, f"has {size - end} bytes after its last tensor; fetch it again")


def _check_ranks(tensors: Mapping[str, TensorInfo], field: str, most: int) -> None:
    """Refuse low-rank pairs whose halves cannot be multiplied, and ranks past all reason."""
    ranks: dict[str, int] = {}
    for module, key, rank in _halves(tensors):
        if rank is None:
            shape = _sizes(tensors[key].shape)
            what = f"holds {_shown(key)} of shape {shape}, which is no half of a low-rank pair"
            raise LoraError(field, f"{what}; fetch it again or ask its author for another file")
        if ranks.setdefault(module, rank) != rank:
            raise LoraError(
                field,
                f"is broken: the halves of {_shown(module)} have the ranks {ranks[module]} and {rank}; "
                "fetch it again or ask its author for another file",
            )
        if rank > most:
            raise LoraError(field, f"has rank {rank} in {_shown(module)}, at most {most} is taken; resize the LoRA")


def _halves(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str, int | None]]:
    """Yield module, key and rank of each half of a low-rank pair; no rank where the tensor is no matrix."""
    for key, info in tensors.items():
        match = _HALF.fullmatch(key)
        if match is not None:
            matrix = len(info.shape) >= 2
            yield match["module"], key, info.shape[_RANK_AXIS[match["half"]]] if matrix else None


def _sizes(shape: tuple[int, ...] | list[int]) -> str:
    return str(list(shape))[:SHOWN]


def _shown(key: str) -> str:
    return repr(key[:SHOWN])
