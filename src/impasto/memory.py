"""Giving memory back: large blocks go to the system when they are freed, and are not kept for later.

Knows the C library's allocator (glibc; elsewhere nothing is done). By default it learns from the first large block that
is freed to keep such blocks, and a server that has read one large picture stays large.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

LARGE: Final = 2**20  # bytes from which a block is the system's own
_M_MMAP_THRESHOLD: Final = -3  # of mallopt(3)


def give_back_large_blocks() -> bool:
    """Fix the threshold for this process; return whether that could be done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE))
    except (OSError, AttributeError):  # another C library
        return False
