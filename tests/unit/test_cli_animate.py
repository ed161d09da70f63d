"""``impasto animate``: what is written, and what is refused, with the word that was typed."""

from __future__ import annotations

import io
from pathlib import Path

import av
import pytest
from PIL import Image
from typer.testing import CliRunner

from impasto.cli import app
from impasto.errors import ImpastoError
from impasto.models.catalog import BUILTIN_FOLDER

FEW = ("--size", "256*256", "--steps", "1", "--frames", "8", "--seed", "7", "--guidance", "1")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "start.png"
    Image.new("RGB", (300, 200), (50, 110, 225)).save(path)
    return path


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, ["animate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_a_picture_becomes_a_webm_and_an_animated_webp(picture: Path, tmp_path: Path) -> None:
    """Frames, size and pace as asked; a LoRA by its name and scale."""
    webm, webp = tmp_path / "made" / "a.webm", tmp_path / "made" / "a.webp"
    run(picture, "--prompt", "a frog", *FEW, "--fps", 5, "-o", webm)
    with av.open(io.BytesIO(webm.read_bytes())) as container:
        [stream] = container.streams.video
        sizes = [(frame.width, frame.height) for frame in container.decode(stream)]
        assert sizes == [(256, 256)] * 8 and stream.average_rate == 5
    lora = f"{BUILTIN_FOLDER / 'loras' / 'pixel-art.safetensors'}:0.5"
    run(picture, "--prompt", "a frog", *FEW, "--lora", lora, "-o", webp)
    made = Image.open(io.BytesIO(webp.read_bytes()))
    assert (made.n_frames, made.size) == (8, (256, 256))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("-o", "a.mp4"), r"output must end in \.webm, \.webp"),
        (("--frames", "33"), "frames must be between 8 and 32"),
        (("--fps", "0"), "fps must be between 1 and 30"),
        (("--size", "1536*512"), "--size must be between 256 and 1024"),
        (("--model", "me/model"), "--motion-adapter is needed"),
        (("--lora", "no-such-file.safetensors"), "no-such-file"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(picture: Path, options: tuple[str, ...], problem: str) -> None:
    """By the option or the field."""
    with pytest.raises(ImpastoError, match=problem):
        run(picture, "--prompt", "a frog", *options)


def test_a_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(ImpastoError, match=r"IMAGE .*cannot be read"):
        run(tmp_path / "none.png", "--prompt", "a frog")
