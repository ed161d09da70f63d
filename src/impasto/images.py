"""Pictures to file bytes and back: what we write, and what we take from strangers.

Knows Pillow and the fast PNG encoder. Knows no requests, jobs or tensors, opens no path and no address. Bytes from
outside go through ``read_picture``, which believes nothing but the bytes; what it gives is encoded anew before a job
is made of it. An upload alone is kept as it was sent, once ``check_picture`` has said which type it is served as.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pybase64
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from impasto.errors import InvalidInput
from impasto.metadata import as_exif, into_png
from impasto.types import LIMITS, Bounds, OutputFormat

try:
    import fpng
except ImportError:  # no build for this platform: Pillow is twenty times slower, and right
    fpng = None

CONTENT_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_INPUT_BYTES: Final = 20_000_000  # of a file that is read
SPARSEST: Final = 0.6  # bytes in a character of base64 with as much white space in it as anybody puts there
MAX_INPUT_PIXELS: Final = 50_000_000  # the largest cameras; a decoded picture has 3 or 4 bytes for each
# Quality over size: these are originals, not thumbnails.
_SAVE_OPTIONS: dict[OutputFormat, dict[str, Any]] = {
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
    "webp": {"quality": 90, "method": 0},
}
# What is read, by the names of Pillow's decoders. The others are never tried, TIFF among them: its decoder is the
# largest by far and writes what it thinks of a stranger's file to our standard error.
INPUT_TYPES: Final = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
_DECODERS: Final = tuple(INPUT_TYPES)
_REMEDY: Final = "send a PNG, JPEG, WebP, GIF or BMP picture"
_DAMAGED: Final = "is cut off or damaged: save the picture again and send the whole file"
_SIGNATURES: Final = {  # what people send instead, by its first bytes in lower case, so that the refusal can name it
    b"ii*\0": "a TIFF", b"mm\0*": "a TIFF", b"8bps": "a Photoshop file",
    b"<svg": "an SVG drawing", b"<?xml": "an XML document or SVG drawing", b"<!doctype html": "an HTML page",
    b"<html": "an HTML page", b"%pdf": "a PDF document", b"pk\x03\x04": "a ZIP archive",
}  # fmt: skip
_OURS: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")  # WebP apart
_CONTAINERS: Final = {b"avif": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIF"}  # after "ftyp"


def encode_image(image: Image.Image, file_format: OutputFormat, text: str | None = None) -> bytes:
    """Encode an RGB picture as ``png`` (lossless), ``jpeg`` or ``webp`` file bytes, with ``text`` in it if given."""
    if file_format == "png":
        data = _png(image.convert("RGB"))
        return data if text is None else into_png(data, text)
    exif = {} if text is None else {"exif": as_exif(text)}
    buffer = io.BytesIO()
    image.save(buffer, file_format.upper(), **_SAVE_OPTIONS[file_format], **exif)
    return buffer.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """Encode an RGB, RGBA or L picture as PNG with every value kept and no metadata; ``decode_png`` is the inverse."""
    return _png(image)


def _png(image: Image.Image) -> bytes:
    """Encode by the fast encoder, which knows two modes; it may also be missing where it has no build."""
    if fpng is not None and image.mode in ("RGB", "RGBA"):
        return bytes(fpng.from_ndarray(np.ascontiguousarray(image)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes) -> Image.Image:
    """Decode what ``encode_png`` made; for bytes from anywhere else there is ``read_picture``."""
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.load()
    return image


def format_of(path: Path) -> OutputFormat:
    """Tell the format from a file name.

    Raises:
        InvalidInput: The extension is not one we write.
    """
    known: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    try:
        return known[path.suffix.lower()]
    except KeyError:
        raise InvalidInput("output", f"must end in {', '.join(known)}, got {path.name!r}") from None


def decode_payload(text: str, field: str) -> bytes:
    """Return the bytes in a ``data:`` URI (RFC 2397, base64) or in naked base64 (RFC 4648).

    White space, missing padding and the URL-safe alphabet are fine. The type that a URI claims is not looked at:
    real clients claim wrong ones. Neither paths nor addresses are followed.

    Raises:
        InvalidInput: Neither, an address, or more than ``MAX_INPUT_BYTES``.
    """
    start = text[:100].lstrip().lower()
    if start.startswith(("http:", "https:")):
        raise InvalidInput(
            field, "is a URL, and none is followed here: give the picture itself, as a data URI or base64"
        )
    if start.startswith("data:"):
        text = _payload_of_uri(text, field)
    check_bytes(int(len(text) * SPARSEST), field)  # before it is copied
    digits = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    check_bytes(len(digits) * 3 // 4, field)
    try:
        return pybase64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError:  # also of text that is not ASCII
        problem = "is neither a data URI nor base64, and paths are not read"
        raise InvalidInput(field, f"{problem}: send the picture itself in one of the two forms") from None


def read_picture(data: bytes, field: str) -> Image.Image:
    """Decode a picture that somebody sent into RGB, or RGBA where any of it is transparent.

    The kinds of ``INPUT_TYPES`` are told by their bytes. Of an animation the first picture is taken; the camera's
    orientation is applied; 16-bit values keep their upper eight bits. Size is checked in the header, before anything
    is decoded.

    Raises:
        InvalidInput: Another kind of file, too large, cut off or damaged; ``field`` and the message say which.
    """
    with _opened(data, field) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _eight_bits(image)


def check_picture(data: bytes, field: str) -> str:
    """Return the content type of a picture that somebody sent, from its header; its pixels are not decoded.

    Raises:
        InvalidInput: As ``read_picture``; damage behind the header is not seen.
    """
    with _opened(data, field) as image:
        # The JPEG decoder calls a file with several JPEGs, as some cameras write it, by another name.
        return INPUT_TYPES.get(str(image.format), "image/jpeg")


def count_pixels(data: bytes, field: str) -> int:
    """Return how many pixels a picture has that somebody sent, from its header.

    Raises:
        InvalidInput: As ``check_picture``.
    """
    with _opened(data, field) as image:
        return int(image.width * image.height)


def mask_of(image: Image.Image) -> Image.Image:
    """Turn a picture into a mask of mode L: white (255) is painted, black (0) is kept, grey is between.

    Colours count by their brightness, and transparent parts are black. Where there are transparent parts and the
    rest is all of one colour, as brushes and selections leave it, the drawing is in the opacity alone: opaque is
    white.
    """
    if not image.has_transparency_data:
        return image.convert("L")
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    seen = np.asarray(rgba)[np.asarray(alpha) > 0][:, :3]
    if alpha.getextrema() != (255, 255) and (seen == seen[:1]).all():
        return alpha
    return ImageChops.multiply(rgba.convert("L"), alpha)


def natural_size(image: Image.Image, bounds: Bounds = LIMITS.side) -> tuple[int, int]:
    """Return the width and height, in pixels, to draw at for a start picture: its own as nearly as ``bounds`` allow.

    Too large a picture is scaled down and too small a one up, in proportion; each side is then rounded to the grid.
    """
    low, high, grid = int(bounds.low), int(bounds.high), LIMITS.side_multiple
    scale = min(max(1.0, low / min(image.size)), high / max(image.size))
    width, height = (min(max(round(side * scale / grid) * grid, low), high) for side in image.size)
    return width, height


def _payload_of_uri(text: str, field: str) -> str:
    head, comma, payload = text.partition(",")
    if not comma or not head.rstrip().lower().endswith(";base64"):
        raise InvalidInput(field, 'is a data URI without base64; write "data:image/png;base64,…"')
    return payload


@contextmanager
def _opened(data: bytes, field: str) -> Iterator[Image.Image]:
    """Open a picture's header and check its size; whatever fails in the block is the picture's fault."""
    check_bytes(len(data), field)
    if not data:
        raise InvalidInput(field, f"is empty; {_REMEDY}")
    try:
        with Image.open(io.BytesIO(data), formats=_DECODERS) as opened:
            _check_pixels(opened.size, field)
            yield opened
    except InvalidInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidInput(field, _too_many("far more")) from None
    except UnidentifiedImageError:
        raise InvalidInput(field, _DAMAGED if begins_like_picture(data) else f"is {_kind(data)}; {_REMEDY}") from None
    except Exception:  # noqa: BLE001  (on damaged bytes the decoders raise a dozen kinds of errors)
        raise InvalidInput(field, _DAMAGED) from None


def begins_like_picture(data: bytes) -> bool:
    """Whether the bytes begin like a kind of picture that is taken."""
    return data.startswith(_OURS) or data[:4] + data[8:12] == b"RIFFWEBP"


def check_bytes(count: int, field: str) -> None:
    """Raise ``InvalidInput`` if a picture's file has more than ``MAX_INPUT_BYTES``."""
    if count > MAX_INPUT_BYTES:
        most = f"at most {MAX_INPUT_BYTES // 10**6} MB are taken: send a smaller picture"
        raise InvalidInput(field, f"has {count / 1e6:.1f} MB; {most}")


def _check_pixels(size: tuple[int, int], field: str) -> None:
    width, height = size
    if width * height > MAX_INPUT_PIXELS:
        raise InvalidInput(field, _too_many(f"{width}x{height}"))


def _too_many(pixels: str) -> str:
    return f"has too many pixels ({pixels}); at most {MAX_INPUT_PIXELS // 10**6} million are taken: scale it down"


def _kind(data: bytes) -> str:
    """Name what is no picture of ours, from its first bytes."""
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if data[4:8] == b"ftyp":
        return _CONTAINERS.get(data[8:12], "a video")
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return kind
    text = all(byte >= 32 or byte in b"\t\r\n" for byte in data[:200]) and _is_utf8(data[:200])
    return "text" if text else "no picture that is known here"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start > len(data) - 4  # a character cut in two by the cut
    return True


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the picture as RGB, or as RGBA if any pixel is not opaque."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip and not scale
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy of the largest has 200 MB
    rgba = image.convert("RGBA")
    return rgba.convert("RGB") if rgba.getchannel("A").getextrema() == (255, 255) else rgba
