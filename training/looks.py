"""The two looks that the shipped LoRAs teach, as pictures made from the same drawings: pixel art and line art.

Knows drawings and how to redraw them. Does not know captions, latents or networks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from training.art import Pixels
from training.crops import Picture
from training.pools import compose
from training.subjects import STYLES

Colour = tuple[int, int, int]
Spot = tuple[int, int, int]
Look = Callable[[Pixels, int, Colour, Spot], Picture]

WHITE: Colour = (255, 255, 255)
CELLS = 32  # pixel art has so many squares a side: at 512 px a square is 16 px, two latents
COLOURS = 10  # of one object
SOLID = 110  # the least opacity, of 255, with which a square belongs to the object
OUTLINE = np.array((36, 28, 44), np.uint8)
LINE = 21  # pixels at 512 px; half of it lies outside the object: more than a latent, so that the autoencoder keeps it
GREY = 51  # of 255, between neighbouring greys


def pixel_art(art: Pixels, side: int, colour: Colour, spot: Spot) -> Picture:
    """Squares of one colour each, few colours, a dark outline; on the background asked for.

    Args:
        art: (styles, height, width, 4), one subject.
        side: Pixels of the square picture; a multiple of ``CELLS``.
        colour: Background, 0..255.
        spot: Size of the object, and its top and left edge, in pixels.

    Returns:
        (3, side, side), -1..1.
    """
    cell = side // CELLS
    size, y, x = (round(value / cell) for value in spot)
    small = Image.fromarray(art[STYLES.index("3d")]).convert("RGBa").resize((size, size), Image.Resampling.BOX)
    object_cells = small.convert("RGBA")
    mask = np.zeros((CELLS, CELLS), bool)
    mask[y : y + size, x : x + size] = solid = np.asarray(object_cells)[..., 3] > SOLID
    cells = np.empty((CELLS, CELLS, 3), np.uint8)
    cells[:] = colour
    cells[mask] = few_colours(np.asarray(object_cells.convert("RGB"))[solid])
    cells[grown(mask) & ~mask] = OUTLINE
    return scaled(cells.repeat(cell, 0).repeat(cell, 1))


def line_art(art: Pixels, side: int, colour: Colour, spot: Spot) -> Picture:
    """A black contour around a few greys, on white; the background asked for is left out.

    Args and result are those of ``pixel_art``. Lines inside the contour are left to the darkest grey: the model learned
    that there are some but not where, and hatched everything.
    """
    shape = Image.fromarray(
        ((1 - compose(shadow(art[STYLES.index("3d")]), side, WHITE, spot)[0]) * 127).astype(np.uint8)
    )
    around = np.asarray(shape.filter(ImageFilter.MaxFilter(LINE)).filter(ImageFilter.GaussianBlur(1.2))) / 254
    drawn = compose(art[STYLES.index("3d")], side, (0, 0, 0), spot).transpose(1, 2, 0)
    grey = np.asarray(Image.fromarray(((drawn + 1) * 127.5).astype(np.uint8)).convert("L"))
    greys = (grey // GREY * (255.0 / (255 // GREY))).clip(0, 255)
    inside = np.asarray(shape) / 254
    return scaled((255 * (1 - around) + inside * greys).clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2))


def shadow(art: Pixels) -> Pixels:
    """The drawing in black alone."""
    return np.concatenate([np.zeros_like(art[..., :3]), art[..., 3:]], -1)


def few_colours(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (n, 3) in stronger colours, and only ``COLOURS`` of them."""
    strip = Image.fromarray(pixels[None])
    strong = ImageEnhance.Color(ImageEnhance.Contrast(strip).enhance(1.2)).enhance(1.2)
    few: NDArray[np.uint8] = np.asarray(strong.quantize(COLOURS, Image.Quantize.MEDIANCUT).convert("RGB"))
    return few.reshape(pixels.shape)


def grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and the four neighbours of each of its cells."""
    padded = np.pad(mask, 1)
    around = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return np.asarray(mask | around)


def scaled(picture: NDArray[np.uint8]) -> Picture:
    """From 0..255, channels last, to -1..1, channels first."""
    return np.ascontiguousarray((picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1))


LOOKS: dict[str, Look] = {"pixel-art": pixel_art, "line-art": line_art}
