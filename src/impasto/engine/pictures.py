"""Start pictures and masks made ready: sized to the request, holes filled, and the kept pixels put back at the end.

Knows pixels. Knows no latents, networks or steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from impasto.errors import InvalidInput
from impasto.images import mask_of
from impasto.types import GenerationRequest

Pixels = NDArray[np.uint8]
OPAQUE = 255
NEARLY_OPAQUE = 250  # from here on up a picture has no holes: tools leave such values where nothing shows


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What a request starts from, at the size it asks for.

    Attributes:
        pixels: ``[H, W, 3]``.
        mask: 255 where to paint, 0 where to keep, between in between, ``[H, W]``; ``None``: no mask.
    """

    pixels: Pixels = field(repr=False)
    mask: Pixels | None = field(repr=False)

    @classmethod
    def of(cls, request: GenerationRequest) -> Start | None:
        """Prepare the pictures of a request; ``None`` if it has none.

        The picture is scaled to cover the asked size and cropped at its centre, and the mask with it. Without a
        mask, transparent parts of the picture are painted: a picture with a transparent border is painted outwards.

        Raises:
            InvalidInput: The mask keeps everything, or picture and mask have different shapes.
        """
        if request.image is None:
            return None
        size = (request.width, request.height)
        picture = request.image
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            alpha = picture.getchannel("A")
            holes = ImageOps.invert(alpha) if np.asarray(alpha).min() < NEARLY_OPAQUE else None
            picture = _filled(picture) if holes else picture.convert("RGB")
        else:
            picture, holes = picture.convert("RGB"), None
        mask = holes if request.mask_image is None else mask_of(request.mask_image)
        if mask is not None:
            if request.mask_image is not None and not _same_shape(mask.size, picture.size):
                raise InvalidInput(
                    "mask_image", f"is {mask.width}x{mask.height}, of another shape than image ({_by(picture)})"
                )
            mask = _fitted(mask, size)
            if not np.asarray(mask).any():
                if request.mask_image is not None:
                    raise InvalidInput("mask_image", "keeps all of the picture at the asked size; white is painted")
                mask = None  # the transparent parts are cropped away
        return cls(np.asarray(_fitted(picture, size)), None if mask is None else np.asarray(mask))

    def finish(self, picture: Pixels) -> Pixels:
        """Put the kept pixels back, bit for bit; where the mask is grey the pictures are mixed."""
        if self.mask is None:
            return picture
        paint = self.mask[..., None].astype(np.uint32)
        mixed = (paint * picture + (OPAQUE - paint) * self.pixels + OPAQUE // 2) // OPAQUE
        return mixed.astype(np.uint8)


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether one covers the other when scaled, to within a pixel."""
    return abs(a[0] * b[1] - b[0] * a[1]) <= max(*a, *b)


def _by(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _filled(picture: Image.Image) -> Image.Image:
    """Fill transparent parts with the colours around them, ever coarser farther away (pull-push)."""
    levels = [picture.convert("RGBa")]  # premultiplied, so that transparent pixels weigh nothing
    while max(levels[-1].size) > 1:
        width, height = levels[-1].size
        levels.append(levels[-1].resize(((width + 1) // 2, (height + 1) // 2), Image.Resampling.BOX))
    below = _unweighted(levels.pop())
    for level in reversed(levels):
        ground = np.asarray(below.resize(level.size, Image.Resampling.BILINEAR), np.float32)
        here = np.asarray(level, np.float32)
        clear = 1 - here[..., 3:] / OPAQUE
        below = Image.fromarray((here[..., :3] + clear * ground).round().clip(0, OPAQUE).astype(np.uint8))
    opaque = np.asarray(picture.getchannel("A")) == OPAQUE
    result: NDArray[Any] = np.where(opaque[..., None], np.asarray(picture.convert("RGB")), np.asarray(below))
    return Image.fromarray(result)


def _unweighted(pixel: Image.Image) -> Image.Image:
    """The mean colour of the opaque parts; grey if there are none."""
    *colour, alpha = (float(channel) for channel in np.asarray(pixel, np.float32).reshape(4))
    mean = [round(value * OPAQUE / alpha) for value in colour] if alpha else [128, 128, 128]
    return Image.fromarray(np.array([[mean]], np.uint8).clip(0, OPAQUE))
