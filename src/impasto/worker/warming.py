"""Reading a file ahead, so that whoever parses it later, and holds everybody up meanwhile, finds it in memory.

Knows files. Knows nothing of what is in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

CHUNK: Final = 2**20  # bytes read at a time; the interpreter is free for others while the disk works


def read_ahead(file: Path) -> int:
    """Read a file once, into the system's cache; return the bytes. Errors are left to whoever parses it."""
    read = 0
    buffer = bytearray(CHUNK)
    try:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                read += count
    except OSError:
        pass
    return read
