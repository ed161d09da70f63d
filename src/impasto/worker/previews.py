"""Rough pictures of what is becoming, made small enough to travel through the database once or twice a second.

Knows JPEG and the limits. Knows nothing of latents (``models/vae.py`` makes the pictures) or of who looks.
"""

from __future__ import annotations

import base64
import io
from typing import Final

from PIL import Image

from impasto.jobs.events import Thumbnail
from impasto.types import Preview

MAX_SIDE: Final = 192  # pixels of the long side
MAX_BYTES: Final = 8192  # of a JPEG, if at all possible
PREVIEWS_PER_JOB: Final = 15  # about as many for each image, whatever its number of steps
_TRIES: Final = ((MAX_SIDE, 75), (MAX_SIDE, 50), (128, 50), (96, 40), (64, 30))  # long side, quality


def preview_every(steps: int) -> int:
    """Return the steps between two previews of a job."""
    return max(1, steps // PREVIEWS_PER_JOB)


def thumbnail(preview: Preview) -> Thumbnail:
    """Return the picture as a JPEG of at most ``MAX_SIDE`` pixels a side and ``MAX_BYTES`` bytes."""
    data = b""
    for side, quality in _TRIES:
        data = _jpeg(preview.image, side, quality)
        if len(data) <= MAX_BYTES:
            break
    return Thumbnail(preview.index, preview.step, base64.b64encode(data).decode("ascii"))


def _jpeg(image: Image.Image, side: int, quality: int) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=quality, optimize=True)
    return data.getvalue()
