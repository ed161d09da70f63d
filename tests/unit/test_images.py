"""Pictures to bytes: each format reads back as what it is, PNG without loss."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from impasto.errors import InvalidInput
from impasto.images import CONTENT_TYPES, encode_image, format_of
from impasto.types import OUTPUT_FORMATS


@pytest.fixture
def picture() -> Image.Image:
    """Smooth colour with a hard edge, of an odd size."""
    across = np.linspace(0, 255, 67)[None, :, None].repeat(45, 0).repeat(3, 2)
    across[10:20, 10:20] = (255, 0, 0)
    return Image.fromarray(across.astype(np.uint8))


@pytest.mark.parametrize("file_format", OUTPUT_FORMATS)
def test_each_format_reads_back(picture, file_format):
    """The bytes are of the named format, the right size, and close to the picture."""
    decoded = Image.open(io.BytesIO(encode_image(picture, file_format)))
    assert decoded.format.lower() == file_format
    assert Image.MIME[decoded.format] == CONTENT_TYPES[file_format]
    assert np.abs(np.asarray(decoded.convert("RGB")).astype(int) - np.asarray(picture)).mean() < 2


def test_png_is_lossless(picture):
    """Not one value changes."""
    decoded = Image.open(io.BytesIO(encode_image(picture, "png")))
    assert np.array_equal(np.asarray(decoded), np.asarray(picture))


@pytest.mark.parametrize(
    ("name", "expected"), [("a.png", "png"), ("a.JPG", "jpeg"), ("a.jpeg", "jpeg"), ("a.webp", "webp")]
)
def test_the_extension_names_the_format(name, expected):
    """Upper and lower case."""
    assert format_of(Path(name)) == expected


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.exe"])
def test_other_extensions_are_refused_with_the_choice(name):
    """The message lists what is written."""
    with pytest.raises(InvalidInput, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        format_of(Path(name))
