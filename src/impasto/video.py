"""Frames to video files: VP9 in WebM, and animated WebP.

Knows PyAV, which brings FFmpeg's encoders, and Pillow. Knows no requests, jobs or tensors, and reads no videos.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from impasto.errors import ConfigError, InvalidInput
from impasto.metadata import as_exif
from impasto.types import VIDEO_FORMATS, VideoFormat

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEO_TYPES: Final[dict[VideoFormat, str]] = {"webm": "video/webm", "webp": "image/webp"}
MILLISECONDS: Final = 1000
# Quality over size, as for pictures: these are originals. ``crf`` goes from 0, lossless, to 63.
_VP9: Final = {"crf": "18", "b": "0", "row-mt": "1", "deadline": "good", "cpu-used": "4", "threads": "1"}
_WEBP: Final = {"quality": 90, "method": 2}


def encode_video(frames: Sequence[Image], fps: int, file_format: VideoFormat, text: str | None = None) -> bytes:
    """Encode frames of one size as ``webm`` (VP9, even sides) or ``webp`` (animated, in an endless loop).

    Args:
        frames: RGB pictures, at least one.
        fps: Frames a second. WebP counts whole milliseconds, so it is met on the average.
        file_format: Which of the two.
        text: How they were made: the ``COMMENT`` tag of a WebM, EXIF of a WebP.

    Raises:
        ConfigError: WebM was asked for, and PyAV is not installed.
    """
    return _webm(frames, fps, text) if file_format == "webm" else _webp(frames, fps, text)


def video_format_of(path: Path) -> VideoFormat:
    """Tell the format from a file name.

    Raises:
        InvalidInput: The extension is not one we write.
    """
    for file_format in VIDEO_FORMATS:
        if path.suffix.lower() == f".{file_format}":
            return file_format
    raise InvalidInput("output", f"must end in {', '.join(f'.{name}' for name in VIDEO_FORMATS)}, got {path.name!r}")


def durations(count: int, fps: int) -> list[int]:
    """Return how long each frame is shown, in whole milliseconds, so that no error adds up."""
    edges = [round(i * MILLISECONDS / fps) for i in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(edges)]


def _webm(frames: Sequence[Image], fps: int, text: str | None) -> bytes:
    try:
        import av
    except ImportError:
        raise ConfigError("WebM needs PyAV: install it (pip install av), or ask for webp") from None
    width, height = frames[0].size
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        if text is not None:
            container.metadata["comment"] = text
        stream: Any = container.add_stream("libvpx-vp9", rate=fps, options=_VP9)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for position, image in enumerate(frames):
            frame: Any = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")
            frame.pts = position
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _webp(frames: Sequence[Image], fps: int, text: str | None) -> bytes:
    first, *rest = (image.convert("RGB") for image in frames)
    exif = {} if text is None else {"exif": as_exif(text)}
    buffer = io.BytesIO()
    shown: Any = durations(len(frames), fps)
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=shown, loop=0, **_WEBP, **exif)
    return buffer.getvalue()
