"""Pictures to file bytes, and the formats we write.

Knows Pillow and the fast PNG encoder. Knows no requests, jobs or tensors.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fpng
import numpy as np
from PIL import Image

from impasto.errors import InvalidInput
from impasto.types import OutputFormat

CONTENT_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# Quality over size: these are originals, not thumbnails.
_SAVE_OPTIONS: dict[OutputFormat, dict[str, Any]] = {
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
    "webp": {"quality": 90, "method": 0},
}


def encode_image(image: Image.Image, file_format: OutputFormat) -> bytes:
    """Encode an RGB picture as ``png`` (lossless), ``jpeg`` or ``webp`` file bytes."""
    if file_format == "png":
        return bytes(fpng.from_ndarray(np.ascontiguousarray(image.convert("RGB"))))
    buffer = io.BytesIO()
    image.save(buffer, file_format.upper(), **_SAVE_OPTIONS[file_format])
    return buffer.getvalue()


def format_of(path: Path) -> OutputFormat:
    """Tell the format from a file name.

    Raises:
        InvalidInput: The extension is not one we write.
    """
    known: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    try:
        return known[path.suffix.lower()]
    except KeyError:
        raise InvalidInput("output", f"must end in {', '.join(known)}, got {path.name!r}") from None
