"""Pictures to bytes and back: what we write reads back, and what strangers send is a picture or a clear refusal."""

import base64
import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from impasto.errors import InvalidInput
from impasto.images import (
    CONTENT_TYPES,
    INPUT_TYPES,
    check_picture,
    decode_payload,
    decode_png,
    encode_image,
    encode_png,
    format_of,
    mask_of,
    natural_size,
    read_picture,
)
from impasto.types import OUTPUT_FORMATS


@pytest.fixture
def picture() -> Image.Image:
    """Smooth colour with a hard edge, of an odd size."""
    across = np.linspace(0, 255, 67)[None, :, None].repeat(45, 0).repeat(3, 2)
    across[10:20, 10:20] = (255, 0, 0)
    return Image.fromarray(across.astype(np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes) -> Image.Image:
    return read_picture(data, "image")


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


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


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_start_pictures_and_masks_are_kept_without_loss(mode):
    """Every value of colour, opacity and grey comes back, colours under transparent pixels too."""
    channels = Image.new(mode, (1, 1)).getbands()
    values = np.random.default_rng(1).integers(0, 256, (33, 47, len(channels)), np.uint8)
    image = Image.fromarray(values.squeeze())
    assert image.mode == mode
    assert same(decode_png(encode_png(image)), image)


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


DATA = bytes(range(256)) + b"ab"  # its base64 has +, / and padding
BASE64 = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        BASE64,
        BASE64.rstrip("="),
        "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)) + "\r\n",
        base64.urlsafe_b64encode(DATA).decode(),
        f"data:image/png;base64,{BASE64}",
        f" DATA:image/jpeg;name=a.jpg;BASE64, {BASE64}",
        f"data:;base64,{BASE64}",
    ],
    ids=["naked", "unpadded", "wrapped", "url-safe", "uri", "odd uri", "uri without a type"],
)
def test_base64_is_read_in_every_common_form(text):
    """Real clients send all of these; the type that a URI claims does not matter."""
    assert decode_payload(text, "image") == DATA


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("https://example.com/a.png", "is a URL, and none is followed here: give the picture itself"),
        (" HTTP://example.com/a.png", "is a URL"),
        ("/home/me/fox.png", "is neither a data URI nor base64, and paths are not read"),
        ("C:\\fox.png", "paths are not read"),
        ("file:///home/me/fox.png", "paths are not read"),
        ("data:image/png,%89PNG", "is a data URI without base64"),
        ("data:image/png;base64", "is a data URI without base64"),
        ("data:image/png;base64,a$b", "is neither a data URI nor base64"),
        ("abcde", "is neither a data URI nor base64"),
        ("a picture: of a fox", "is neither a data URI nor base64"),
        ("füchse", "is neither a data URI nor base64"),
        ("A" * 27_000_000, r"has 20\.2 MB; at most 20 MB are taken"),
    ],
    ids=lambda value: value[:20],
)
def test_other_text_is_refused_with_a_remedy(text, problem):
    """The message says what it was taken for and what to send."""
    with pytest.raises(InvalidInput, match=problem) as caught:
        decode_payload(text, "image")
    assert caught.value.field == "image"
    assert len(str(caught.value)) < 200


def test_a_path_is_not_looked_at(tmp_path, monkeypatch):
    """Neither a real file's name nor a URI of it opens anything."""
    file = tmp_path / "fox.png"
    file.write_bytes(saved(Image.new("RGB", (8, 8))))
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("io.open", None)
    for text in (str(file), file.as_uri()):
        with pytest.raises(InvalidInput):
            read(decode_payload(text, "image"))


@pytest.mark.parametrize("kind", INPUT_TYPES)
def test_each_kind_is_told_by_its_bytes(picture, kind):
    """Size and content come out, as RGB; a GIF has but 256 colours."""
    image = read(saved(picture, kind, quality=95))
    assert (image.mode, image.size) == ("RGB", picture.size)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture)).mean() < (20 if kind == "GIF" else 4)


@pytest.mark.parametrize(("kind", "content_type"), INPUT_TYPES.items())
def test_the_type_of_a_picture_is_told_without_decoding_it(picture, kind, content_type, monkeypatch):
    """What it is served as, by its header."""
    data = saved(picture, kind, quality=95)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", pytest.fail)
        assert check_picture(data, "file") == content_type
    with pytest.raises(InvalidInput, match="is cut off or damaged"):
        check_picture(data[:12], "file")


def test_several_jpegs_in_one_file_are_a_jpeg(picture):
    """As cameras with two lenses write them."""
    data = saved(picture, "MPO", save_all=True, append_images=[picture])
    assert check_picture(data, "file") == "image/jpeg"
    assert read(data).size == picture.size


def test_transparency_is_kept_where_there_is_any(picture):
    """One pixel that is not opaque makes RGBA; an alpha channel that is opaque all over is dropped."""
    clear = picture.convert("RGBA")
    assert read(saved(clear)).mode == "RGB"
    clear.putpixel((3, 3), (9, 9, 9, 254))
    assert same(read(saved(clear)), clear)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_other_modes_become_rgb(picture, mode):
    """Bits, grey and palettes mean the same picture."""
    other = picture.convert(mode)
    image = read(saved(other))
    assert same(image, other.convert("RGB"))


def test_transparent_colours_of_palettes_and_rgb_become_rgba():
    """PNG's tRNS chunk, in both of its forms."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert np.asarray(read(saved(palette, transparency=1)))[0].tolist() == [[255, 0, 0, 255], [0, 0, 255, 0]]
    colour = Image.new("RGB", (2, 1), (1, 2, 3))
    colour.putpixel((0, 0), (9, 9, 9))
    assert np.asarray(read(saved(colour, transparency=(1, 2, 3))))[0, :, 3].tolist() == [255, 0]


def test_sixteen_bits_are_scaled_and_not_clipped():
    """A 16-bit grey ramp is a ramp afterwards."""
    ramp = Image.fromarray((np.arange(256, dtype=np.uint16) << 8).reshape(16, 16))
    assert ramp.mode == "I;16"
    assert np.asarray(read(saved(ramp)))[..., 0].ravel().tolist() == list(range(256))


def test_cmyk_becomes_rgb(picture):
    """A JPEG from a print shop."""
    image = read(saved(picture.convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture)).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_camera_s_orientation_is_applied(kind):
    """A picture taken with the camera on its side stands upright: 6 is a quarter turn clockwise."""
    lying = Image.new("RGB", (40, 20), "white")
    lying.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read(saved(lying, kind, exif=exif))
    assert image.size == (20, 40)
    assert np.asarray(image)[5, 10, 1] < 60 < 200 < np.asarray(image)[35, 10, 1]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_the_first_picture_of_an_animation_is_taken(kind):
    """APNG, animated WebP and GIF."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    image = read(saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True))
    assert np.asarray(image)[10, 10].tolist() == [255, 0, 0]


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header claims a huge picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


PNG = saved(Image.effect_noise((64, 64), 99).convert("RGB"))
JPEG = saved(Image.effect_noise((64, 64), 99).convert("RGB"), "JPEG")
WEBP = saved(Image.effect_noise((64, 64), 99).convert("RGB"), "WEBP")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (PNG[: len(PNG) // 2], "is cut off or damaged"),
        (JPEG[: len(JPEG) // 2], "is cut off or damaged"),
        (WEBP[: len(WEBP) // 2], "is cut off or damaged"),
        (PNG[:20] + b"xxxx" + PNG[24:], "is cut off or damaged"),
        (bomb(8000, 7000), r"has too many pixels \(8000x7000\); at most 50 million are taken"),
        (bomb(10_000, 10_000), "has too many pixels .* at most 50 million are taken: scale it down"),
        (bomb(60_000, 60_000), "has too many pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "has too many pixels"),
        (bomb(0, 5), "is cut off or damaged"),
        (saved(Image.new("RGB", (9, 9)), "TIFF"), "is a TIFF; send a PNG, JPEG, WebP, GIF or BMP picture"),
        (b"GIF89a and nothing more", "is cut off or damaged"),
        (b"8BPS and nothing more", "is a Photoshop file; send"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing; send"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "is an XML document or SVG drawing; send"),
        (b"\n<!DOCTYPE html><html>", "is an HTML page; send"),
        (b"\0\0\0\x1cftypavif", "is an AVIF; send"),
        (b"\0\0\0\x1cftypheic", "is a HEIC; send"),
        (b"\0\0\0\x1cftypisom", "is a video; send"),
        (b"%PDF-1.7", "is a PDF document; send"),
        ("ein Füchslein".encode(), "is text; send"),
        (bytes(range(256)), "is no picture that is known here; send"),
        (b"\0" * 20_000_001, r"has 20\.0 MB; at most 20 MB are taken"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_what_is_no_good_picture_is_refused_by_what_it_is(data, problem):
    """One sentence with the field, the fault and the remedy."""
    with pytest.raises(InvalidInput, match=problem) as caught:
        read_picture(data, "mask_image")
    assert caught.value.field == "mask_image"


def test_a_bomb_is_not_decoded(monkeypatch):
    """The header is enough: a control shows that the decoder would be seen."""
    loads = []
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", lambda self: loads.append(self.size))
    with pytest.raises(InvalidInput, match="too many pixels"):
        read(bomb(8000, 7000))
    assert loads == []
    with pytest.raises(InvalidInput):
        read(bomb(16, 16))
    assert loads == [(16, 16)]


def test_the_limit_of_other_users_of_the_imaging_library_is_left_alone():
    """It belongs to the whole process."""
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


@settings(max_examples=300, deadline=None)
@given(source=st.sampled_from([PNG, JPEG, WEBP]), place=st.integers(0, 10**6), bytes_=st.binary(max_size=8))
@example(source=PNG, place=16, bytes_=b"\xff\xff\xff\xff")
def test_damaged_bytes_are_a_picture_or_a_refusal(source, place, bytes_):
    """Whatever is written over a file at whatever place, nothing else comes out."""
    at = place % len(source)
    damaged = source[:at] + bytes_ + source[at + len(bytes_) :]
    with contextlib.suppress(InvalidInput):
        assert read(damaged).mode in ("RGB", "RGBA")


def mask_values(image: Image.Image) -> list[int]:
    mask = mask_of(image)
    assert mask.mode == "L"
    return np.asarray(mask).ravel().tolist()


def row(*pixels: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.array([pixels], np.uint8))


def test_a_mask_is_read_by_its_brightness():
    """White 255, black 0, grey itself, also out of colour; one colour all over is no drawing in the opacity."""
    assert mask_values(row((255,) * 3, (0,) * 3, (128,) * 3)) == [255, 0, 128]
    assert mask_values(row((255, 0, 0))) == [76]
    assert mask_values(row((0, 0, 0), (0, 0, 0))) == [0, 0]


def test_transparent_parts_of_a_mask_are_black():
    """Whatever colour lies under them, and in proportion."""
    clear_white = (255, 255, 255, 0)
    assert mask_values(row(clear_white, (255, 255, 255, 255), (0, 0, 0, 255), (255, 255, 255, 100))) == [0, 255, 0, 100]


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 40)])
def test_a_mask_drawn_in_one_colour_on_nothing_is_its_opacity(colour):
    """As a brush on an empty layer leaves it."""
    assert mask_values(row((*colour, 255), (0, 0, 0, 0), (*colour, 128))) == [255, 0, 128]


def test_a_mask_of_nothing_is_black():
    """All transparent: nothing to paint."""
    assert mask_values(row((255, 255, 255, 0), (9, 9, 9, 0))) == [0, 0]


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((1024, 768), (1024, 768)),
        ((1001, 771), (1000, 768)),
        ((4000, 3000), (1536, 1152)),
        ((300, 200), (768, 512)),
        ((5000, 100), (1536, 512)),
        ((100, 5000), (512, 1536)),
        ((1, 1), (512, 512)),
    ],
)
def test_a_start_picture_has_a_natural_size(size, drawn):
    """Its own, scaled into the limits in proportion as far as that goes, on the grid."""
    assert natural_size(Image.new("1", size)) == drawn
