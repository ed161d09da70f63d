"""What is given in place of a flagged picture.

Knows pictures. Knows nothing of checkers or of why a picture was flagged.
"""

from __future__ import annotations

from typing import Final, Literal

from PIL import Image

from impasto.errors import ContentRefused

Action = Literal["black", "blur", "error"]
BLUR_SIDE: Final = 8  # cells a side that are left of a blurred picture


def replaced(image: Image.Image, action: Action) -> Image.Image:
    """Return a picture of the same size in which nothing of ``image`` can be made out.

    Raises:
        ContentRefused: The action is ``error``.
    """
    match action:
        case "black":
            return Image.new("RGB", image.size)
        case "blur":
            return _means(image).resize(image.size, Image.Resampling.BICUBIC)
        case "error":
            raise ContentRefused(
                "the safety checker flagged a picture of this request, so none is given; "
                "try another prompt or another seed"
            )


def _means(image: Image.Image) -> Image.Image:
    """Return the mean colours of 8 x 8 cells: not a blurred edge is left, whatever the size."""
    return image.convert("RGB").resize((BLUR_SIDE, BLUR_SIDE), Image.Resampling.BOX)
