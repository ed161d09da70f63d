"""Video files: what was asked for is what a decoder finds in them."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from impasto.errors import ConfigError, InvalidInput
from impasto.types import VIDEO_FORMATS, VideoFormat
from impasto.video import VIDEO_TYPES, durations, encode_video, video_format_of

USER_COMMENT = 0x9286


def frames(count: int = 9, size: tuple[int, int] = (72, 64)) -> list[Image.Image]:
    """A white block that goes from left to right over a colour."""
    made = []
    for index in range(count):
        picture = Image.new("RGB", size, (50, 110, 225))
        picture.paste((255, 255, 255), (4 * index, 16, 4 * index + 24, 48))
        made.append(picture)
    return made


def decoded(data: bytes, file_format: VideoFormat) -> list[Image.Image]:
    if file_format == "webm":
        with av.open(io.BytesIO(data)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    opened = Image.open(io.BytesIO(data))
    shown = []
    for index in range(opened.n_frames):
        opened.seek(index)
        shown.append(opened.convert("RGB"))
    return shown


@pytest.mark.parametrize("file_format", VIDEO_FORMATS)
def test_every_frame_comes_back_in_its_size_and_order(file_format: VideoFormat) -> None:
    """Lossy, but each frame is nearer to its own original than to any other."""
    given = frames()
    back = decoded(encode_video(given, 8, file_format), file_format)
    assert [frame.size for frame in back] == [(72, 64)] * len(given)
    pixels, own = (np.stack([np.asarray(frame, np.float32) for frame in some]) for some in (back, given))
    apart = np.abs(pixels[:, None] - own[None]).mean((2, 3, 4))
    assert apart.argmin(1).tolist() == list(range(len(given)))
    assert apart.diagonal().max() < 6


@pytest.mark.parametrize("fps", [1, 8, 30])
def test_a_webm_has_the_pace_that_was_asked_for(fps: int) -> None:
    """Codec, frames a second, and length."""
    with av.open(io.BytesIO(encode_video(frames(), fps, "webm"))) as container:
        [stream] = container.streams.video
        assert stream.codec_context.name == "vp9"
        assert stream.average_rate == fps
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    np.testing.assert_allclose(np.diff(times), 1 / fps, atol=0.001)


@pytest.mark.parametrize("fps", [1, 7, 8, 30])
def test_an_animated_webp_is_right_to_the_millisecond_at_its_end(fps: int) -> None:
    """Whole milliseconds are all it can say, but the error does not add up; it runs for ever."""
    opened = Image.open(io.BytesIO(encode_video(frames(), fps, "webp")))
    shown = []
    for index in range(opened.n_frames):
        opened.seek(index)
        opened.load()
        shown.append(int(opened.info["duration"]))
    assert shown == durations(9, fps)
    assert abs(sum(shown) - 9000 / fps) <= 0.5
    assert opened.info["loop"] == 0


def test_a_file_tells_how_it_was_made_where_it_is_asked_to() -> None:
    """A WebM in its comment, a WebP in its EXIF; and nothing without."""
    text = "a fox, größer\nSteps: 4, Seed: 7"
    with av.open(io.BytesIO(encode_video(frames(), 8, "webm", text))) as container:
        told = {name.lower(): value for name, value in container.metadata.items()}
    assert told["comment"] == text
    exif = Image.open(io.BytesIO(encode_video(frames(), 8, "webp", text))).getexif().get_ifd(0x8769)[USER_COMMENT]
    assert exif.removeprefix(b"UNICODE\0").decode("utf-16-be") == text
    with av.open(io.BytesIO(encode_video(frames(), 8, "webm"))) as container:
        assert "comment" not in {name.lower() for name in container.metadata}
    assert not Image.open(io.BytesIO(encode_video(frames(), 8, "webp"))).getexif()


def test_without_pyav_webm_says_what_to_install_and_webp_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there by default, and may be left out."""
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install av"):
        encode_video(frames(), 8, "webm")
    assert encode_video(frames(), 8, "webp")[:4] == b"RIFF"


def test_the_name_of_a_file_says_its_format() -> None:
    """In any case; others are refused with the list."""
    assert video_format_of(Path("a/B.WEBM")) == "webm" and video_format_of(Path("b.webp")) == "webp"
    with pytest.raises(InvalidInput, match=r"\.webm, \.webp"):
        video_format_of(Path("a.mp4"))
    assert VIDEO_TYPES == {"webm": "video/webm", "webp": "image/webp"}
