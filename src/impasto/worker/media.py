"""What a job has made, as a file: a picture, or all frames of a video, past the safety gate and encoded.

Knows formats, the gate and what a file tells of how it was made. Knows no store, no lease and no backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from impasto.images import CONTENT_TYPES, encode_image
from impasto.safety.gate import SafetyGate
from impasto.types import ImageReady, OutputFormat, VideoFormat, VideoReady
from impasto.video import VIDEO_TYPES, encode_video
from impasto.worker.running import Running


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A finished file."""

    data: bytes = field(repr=False)
    content_type: str
    size: tuple[int, int]  # width and height in pixels
    nsfw: bool


def media_file(event: ImageReady | VideoReady, running: Running, safety: SafetyGate) -> MediaFile:
    """Let a picture or video through the gate and encode it as its request asks.

    Raises:
        ContentRefused: It was flagged, and the operator's action for that is ``error``.
        CheckFailed: It could not be checked.
    """
    return _video(event, running, safety) if isinstance(event, VideoReady) else _picture(event, running, safety)


def _picture(event: ImageReady, running: Running, safety: SafetyGate) -> MediaFile:
    file_format: OutputFormat = running.job.input["output"]["format"]
    content_type = CONTENT_TYPES[file_format]
    image, nsfw = safety.passed(event.image, running.wants_check)
    data = running.signed(encode_image(image, file_format, running.text(event.seed)), content_type)
    return MediaFile(data, content_type, image.size, nsfw)


def _video(event: VideoReady, running: Running, safety: SafetyGate) -> MediaFile:
    """Check each frame by itself: those that are flagged are replaced, and the video counts as flagged."""
    file_format: VideoFormat = running.job.input["output"]["format"]
    content_type = VIDEO_TYPES[file_format]
    frames, flags = zip(*(safety.passed(frame, running.wants_check) for frame in event.frames), strict=True)
    data = running.signed(encode_video(frames, event.fps, file_format, running.text(event.seed)), content_type)
    return MediaFile(data, content_type, frames[0].size, any(flags))
