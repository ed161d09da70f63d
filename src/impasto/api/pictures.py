"""One picture of a request: from the text in the body to a PNG of our own making.

Knows the text, the words for "wrong" and how many pictures may be in memory at once. Knows nothing of fields, jobs
or files. The imaging library is loaded with the first picture, so that the service starts without it.
"""

from __future__ import annotations

import threading
from typing import Final

# A picture of the largest size takes hundreds of megabytes while it is decoded, whatever its file has.
_ROOM: Final = threading.BoundedSemaphore(2)


def to_png(text: str, path: str) -> bytes:
    """Check a start picture, given as a data URI or base64, and return it as PNG.

    Raises:
        InvalidInput: It is none, or too large; ``path`` is its field.
    """
    from impasto.images import decode_payload, encode_png, read_picture

    data = decode_payload(text, path)
    with _ROOM:
        return encode_png(read_picture(data, path))


def to_mask_png(text: str, path: str) -> bytes:
    """Do the same for a mask, and return it as PNG of 8-bit grey: white is painted, black is kept."""
    from impasto.images import decode_payload, encode_png, mask_of, read_picture

    data = decode_payload(text, path)
    with _ROOM:
        return encode_png(mask_of(read_picture(data, path)))


def stand_in(text: str) -> str:
    """Return what to remember of a picture's text: how it began and how long it was, never the picture."""
    return f"{text[:32]}… ({len(text)} characters)" if text else ""
