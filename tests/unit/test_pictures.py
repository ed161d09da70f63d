"""Start pictures and masks: sized to the request, and the kept pixels come back bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from impasto.engine.pictures import Start
from impasto.errors import InvalidInput
from impasto.types import GenerationRequest


def start(image: Image.Image, mask: Image.Image | None = None, size: tuple[int, int] = (64, 64)) -> Start:
    found = Start.of(GenerationRequest("a", image=image, mask_image=mask, width=size[0], height=size[1]))
    assert found is not None
    return found


def noisy(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    bands = {"RGB": 3, "RGBA": 4}[mode]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8))


def test_a_picture_of_the_asked_size_is_taken_as_it_is():
    """No resampling where none is needed."""
    image = noisy((64, 64))
    assert (start(image).pixels == np.asarray(image)).all()


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (63, 64), (1, 1)])
def test_other_shapes_are_scaled_and_cropped_at_the_centre(size):
    """A red band in the middle stays in the middle, unsquashed."""
    image = Image.new("RGB", size, "blue")
    if min(size) > 50:
        image.paste("red", (size[0] // 2 - 20, size[1] // 2 - 20, size[0] // 2 + 20, size[1] // 2 + 20))
    pixels = start(image).pixels
    assert pixels.shape == (64, 64, 3)
    if min(size) > 50:
        red = pixels[..., 0] > 128
        rows, columns = red.any(1).sum(), red.any(0).sum()
        assert abs(int(rows) - int(columns)) <= 2
        assert red[32, 32]


@given(
    generated=arrays.arrays(np.uint8, (16, 16, 3)),
    mask=arrays.arrays(np.uint8, (16, 16), elements=st.sampled_from([0, 1, 127, 128, 254, 255])),
)
def test_kept_pixels_are_bit_identical_and_painted_ones_the_networks(generated, mask):
    """Black keeps, white paints, and grey lies between the two."""
    image = noisy((16, 16))
    found = Start(np.asarray(image), mask).finish(generated)
    kept, painted = np.asarray(image)[mask == 0], generated[mask == 255]
    assert (found[mask == 0] == kept).all()
    assert (found[mask == 255] == painted).all()
    low, high = np.minimum(image, generated), np.maximum(image, generated)
    assert ((found >= low) & (found <= high)).all()


def test_a_transparent_border_is_painted_outwards():
    """Without a mask, what is transparent is the mask, and is filled with the colours beside it."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (16, 16, 48, 48))
    found = start(image)
    assert found.mask is not None
    assert found.mask[0, 0] == 255 and found.mask[32, 32] == 0
    assert (found.pixels[32, 32] == (200, 30, 30)).all()
    assert np.abs(found.pixels[20, 8].astype(int) - (200, 30, 30)).max() < 40, "filled with what is near, not black"


def test_opaque_and_wholly_transparent_pictures():
    """Alpha that hides nothing is no mask; a picture with nothing in it is all painted, from grey."""
    assert start(noisy((64, 64), "RGBA").convert("RGB").convert("RGBA")).mask is None
    empty = start(Image.new("RGBA", (64, 64), (9, 9, 9, 0)))
    assert empty.mask is not None and (empty.mask == 255).all()
    assert (empty.pixels == 128).all()


def test_a_mask_beats_the_pictures_alpha():
    """Where both are given the mask says what is painted."""
    image = Image.new("RGBA", (64, 64), (1, 2, 3, 0))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 8, 8))
    found = start(image, mask).mask
    assert found is not None and (found > 0).sum() == 64


def test_the_mask_is_scaled_with_the_picture():
    """A mask of another resolution but the same shape fits."""
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    found = start(noisy((64, 64)), mask).mask
    assert found is not None and found[:, :28].max() == 0 and found[:, 36:].min() == 255


@pytest.mark.parametrize(
    ("mask", "problem"),
    [(Image.new("L", (64, 64), 0), "keeps all of the picture"), (Image.new("L", (64, 32), 255), "of another shape")],
)
def test_a_mask_that_can_not_be_meant_is_an_error(mask, problem):
    """Named by its field, with the remedy."""
    with pytest.raises(InvalidInput, match=problem) as error:
        start(noisy((64, 64)), mask)
    assert error.value.field == "mask_image"


def test_a_mask_alone_is_an_error():
    """There is nothing to paint into."""
    with pytest.raises(InvalidInput, match="mask_image needs an image"):
        GenerationRequest("a", mask_image=Image.new("L", (64, 64), 255))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "1", "I;16", "CMYK", "F"])
def test_pictures_of_every_mode_are_taken(mode):
    """Grey, palette, one bit, CMYK: the library's users open what they have."""
    assert start(Image.new(mode, (64, 64))).pixels.shape == (64, 64, 3)
