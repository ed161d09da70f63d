"""Start pictures and masks over the wire: what is taken, what is refused at once, what is stored, what is made."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from impasto.images import decode_png
from impasto.jobs.outputs import OutputStore
from tests.sites import Page, Web, running

from .conftest import MODEL, Stack, read, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]
PATH = f"/api/v3/{MODEL}"


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture file."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def text(data: bytes) -> str:
    """Naked base64."""
    return base64.b64encode(data).decode()


def uri(data: bytes, kind: str = "png") -> str:
    """A data URI."""
    return f"data:image/{kind};base64,{text(data)}"


def noise(width: int = 640, height: int = 512) -> Image.Image:
    """A picture that no compression makes small."""
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8))


def half_mask(size: int = 512) -> Image.Image:
    """Paint on the right, keep on the left."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 2, 0, size, size))
    return mask


def inputs(stack: Stack) -> list[Path]:
    """The start pictures on the disk."""
    return [path for path in Path(stack.settings.output_root).glob("inputs/*") if path.is_file()]


def stored(stack: Stack, prediction: dict[str, Any]) -> dict[str, Image.Image]:
    """The pictures of a job as a worker reads them."""
    keys = stack.store.get(prediction["id"]).input["pictures"]
    return {name: decode_png(stack.outputs.get_input(key)) for name, key in keys.items()}


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


PICTURE = noise()
PNG = saved(PICTURE)


@pytest.mark.parametrize(
    "sent",
    [uri(PNG), text(PNG), uri(PNG, "jpeg"), base64.urlsafe_b64encode(PNG).decode(), base64.encodebytes(PNG).decode()],
    ids=["data URI", "naked", "wrong type", "url-safe", "wrapped"],
)
def test_a_picture_is_stored_beside_its_job(stack: Stack, http: httpx.Client, sent: str) -> None:
    """In every form that clients send: pixel for pixel what was sent, in a file of our own making."""
    prediction = submit(http, image=sent)
    assert same(stored(stack, prediction)["image"], PICTURE)


def test_picture_and_mask_are_both_stored(stack: Stack, http: httpx.Client) -> None:
    """The mask as 8-bit grey, the picture with its transparency."""
    clear = PICTURE.convert("RGBA")
    clear.putalpha(200)
    pictures = stored(stack, submit(http, image=uri(saved(clear)), mask_image=uri(saved(half_mask()))))
    assert same(pictures["image"], clear)
    assert same(pictures["mask_image"], half_mask())


def test_what_is_stored_is_not_what_was_sent(stack: Stack, http: httpx.Client) -> None:
    """A picture is encoded anew: comments, the place where a photograph was taken and stowaways are left out."""
    exif = Image.Exif()
    exif[0x010E] = "SECRET PLACE"
    sent = saved(PICTURE, "JPEG", exif=exif, comment=b"SECRET PLACE") + b"<script>alert(1)</script>"
    key = stack.store.get(submit(http, image=uri(sent, "jpeg"))["id"]).input["pictures"]["image"]
    kept = stack.outputs.get_input(key)
    assert kept.startswith(b"\x89PNG")
    assert b"SECRET" in sent and b"SECRET" not in kept and b"script" not in kept


@pytest.mark.parametrize("nothing", ["", None, " \n"])
def test_nothing_is_not_given(stack: Stack, http: httpx.Client, nothing: str | None) -> None:
    """Real clients send empty strings for pictures they have not."""
    assert stored(stack, submit(http, image=nothing, mask_image=nothing)) == {}


def test_the_row_stays_small_and_nothing_is_echoed(stack: Stack, http: httpx.Client) -> None:
    """A megabyte of picture is not in the row, not in the answers: only how it began and how long it was."""
    sent = uri(PNG)
    assert len(sent) > 1_000_000
    answer = http.post(PATH, json={"prompt": "a cat", "image": sent, "mask_image": uri(saved(half_mask()))})
    data = answer.json()["data"]
    assert len(answer.content) < 2000
    assert len(http.get(data["urls"]["get"]).content) < 2000
    row = stack.store.get(data["id"]).input
    assert len(json.dumps(row)) < 3000
    assert row["as_sent"]["image"] == f"{sent[:32]}… ({len(sent)} characters)"


def test_a_stored_picture_cannot_be_fetched(stack: Stack, http: httpx.Client) -> None:
    """Not even by its key: only finished pictures are served."""
    key = stack.store.get(submit(http, image=uri(PNG))["id"]).input["pictures"]["image"]
    assert stack.outputs.get_input(key)
    refusal(http.get(f"/outputs/{key}"), 404)


def test_every_value_of_the_modes_reaches_the_job(serve: Serve) -> None:
    """Strength and refiner as the worker will be asked for them, under their aliases too."""
    with serve(refiner="some-refiner") as stack:
        client = stack.client()
        base = submit(
            client, image=uri(PNG), strength=0.35, refine="base_image_refiner", high_noise_frac=0.7, refine_steps=12
        )
        asked = stack.store.get(base["id"]).input["request"]
        assert (asked["strength"], asked["refine"]) == (0.35, "base_image_refiner")
        assert (asked["high_noise_frac"], asked["refine_steps"]) == (0.7, 12)
        other = submit(client, prompt_strength=0.5, refine="base_model_refiner")
        asked = stack.store.get(other["id"]).input["request"]
        assert (asked["strength"], asked["refine"]) == (0.5, "expert_ensemble_refiner")
        assert (asked["high_noise_frac"], asked["refine_steps"]) == (0.8, None)


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header claims a huge picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD = {
    "bomb": (uri(bomb(30_000, 30_000)), "has too many pixels (far more); at most 50 million"),
    "quiet bomb": (uri(bomb(8000, 8000)), "has too many pixels (8000x8000); at most 50 million"),
    "truncated PNG": (uri(PNG[: len(PNG) // 2]), "is cut off or damaged"),
    "SVG": (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "is an SVG drawing; send a PNG, JPEG, WebP"),
    "HTML": (text(b"<!DOCTYPE html><p>fox"), "is an HTML page"),
    "half a GIF": (uri(saved(PICTURE, "GIF")[:9999], "gif"), "is cut off or damaged"),
    "PSD": (text(b"8BPS\0\1"), "is a Photoshop file"),
    "text": (text(b"a picture of a fox, please"), "is text"),
    "no base64": ("a picture: of a fox!", "is neither a data URI nor base64"),
    "URL": ("https://192.168.0.1/fox.png", "could not be reached: give a public address"),
    "our own host": ("http://127.0.0.1:8000/metrics", "is a URL that must be https"),
    "path": ("/etc/hostname.png", "paths are not read"),
    "path without a dot": ("/etc/passwd", "is no picture that is known here"),
    "path URI": ("file:///etc/passwd", "paths are not read"),
    "URI of no base64": ("data:image/png,hello", "is a data URI without base64"),
    "22 MB": (text(bytes(22_000_000)), "has 22.0 MB; at most 20 MB"),
    "NUL": ("AA\0A", "must not contain NUL"),
}


@pytest.mark.parametrize("field", ["image", "mask_image"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_refused_at_once(stack: Stack, http: httpx.Client, kind: str, field: str) -> None:
    """400 with the field's path, the fault and the remedy; nothing is stored, also of the good picture beside it."""
    before = inputs(stack)
    sent, problem = BAD[kind]
    body = {"prompt": "a cat", "image": uri(saved(half_mask()))} | {field: sent}
    message = refusal(http.post(PATH, json=body), 400)
    assert message.startswith(f'invalid request body, Error at "/{field}": ')
    assert problem in message
    assert len(message) < 300
    assert inputs(stack) == before


def test_a_picture_is_fetched_by_its_address(serve: Serve) -> None:
    """From a host that the operator allows; the row keeps only how the address began."""
    with (
        running(Web()) as web,
        serve(fetch_allow=["127.0.0.1"], fetch_http=True, fetch_ports=[web.server_port]) as stack,
    ):
        web.pages["/fox.png"] = Page(PNG)
        prediction = submit(stack.client(), image=f"{web.url}/fox.png", mask_image=uri(saved(half_mask())))
        assert same(stored(stack, prediction)["image"], PICTURE)
        assert stack.store.get(prediction["id"]).input["as_sent"]["image"].startswith("http://127.0.0.1:")


def test_nothing_is_fetched_for_a_request_that_is_wrong_elsewhere(serve: Serve) -> None:
    """Addresses are dialled last: refusals cost no network."""
    with (
        running(Web()) as web,
        serve(fetch_allow=["127.0.0.1"], fetch_http=True, fetch_ports=[web.server_port]) as stack,
    ):
        web.pages["/fox.png"] = Page(PNG)
        body = {"prompt": "a cat", "image": f"{web.url}/fox.png", "num_images": 99}
        assert "/num_images" in refusal(stack.client().post(PATH, json=body), 400)
        assert web.reached == 0


def test_a_result_can_be_the_next_start_picture(working: Stack) -> None:
    """By the very URL in the answer, which leads to a private address here and is not dialled."""
    done = submit(working.client(), enable_sync_mode=True, num_inference_steps=1)
    [url] = done["outputs"]
    again = submit(working.client(), image=url, strength=0.1, enable_sync_mode=True, num_inference_steps=1)
    assert again["status"] == "completed"


def test_thirty_megabytes_of_picture_are_413(stack: Stack, http: httpx.Client) -> None:
    """They do not fit into a body."""
    assert "at most 33554432 bytes" in refusal(
        http.post(PATH, json={"prompt": "x", "image": text(bytes(30 << 20))}), 413
    )


def test_a_mask_alone_is_refused(stack: Stack, http: httpx.Client) -> None:
    """There is nothing to paint into."""
    before = inputs(stack)
    body = {"prompt": "a cat", "mask_image": uri(saved(half_mask())), "image": ""}
    assert '"/mask_image": needs an image to paint into' in refusal(http.post(PATH, json=body), 400)
    assert inputs(stack) == before


def test_a_refused_job_leaves_no_files(serve: Serve) -> None:
    """The queue is full: picture and mask are stored before that is known, and go again."""
    with serve(max_queued=1) as stack:
        client = stack.client()
        submit(client, image=uri(PNG))
        [kept] = inputs(stack)
        body = {"prompt": "a cat", "image": uri(PNG), "mask_image": uri(saved(half_mask()))}
        refusal(client.post(PATH, json=body), 429)
        assert inputs(stack) == [kept]


def test_a_mask_that_cannot_be_stored_takes_the_picture_with_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk between the two files: try again later, no job and no file."""
    with serve() as stack:
        put, calls = OutputStore.put_input, []

        def full(self: OutputStore, data: bytes) -> str:
            calls.append(data)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return put(self, data)

        monkeypatch.setattr(OutputStore, "put_input", full)
        body = {"prompt": "a cat", "image": uri(PNG), "mask_image": uri(saved(half_mask()))}
        refusal(stack.client().post(PATH, json=body), 503)
        assert len(calls) == 2
        assert inputs(stack) == []
        assert stack.store.queue_depth() == 0


@pytest.fixture
def working(serve: Serve) -> Iterator[Stack]:
    """A service with a worker whose backend mixes a pattern into the start picture, where the mask allows."""
    with serve() as stack, stack.worker():
        yield stack


def drawn(stack: Stack, **body: Any) -> np.ndarray:
    """Run a request to its end and fetch its one picture."""
    done = submit(stack.client(), enable_sync_mode=True, num_inference_steps=2, **body)
    assert done["status"] == "completed", done["error"]
    [url] = done["outputs"]
    return np.asarray(Image.open(io.BytesIO(httpx.get(url, trust_env=False).content))).astype(int)


def test_picture_strength_and_mask_reach_the_worker(working: Stack) -> None:
    """Kept pixels are the start picture's bit for bit; the others come nearer to it with less strength."""
    start = noise(512, 512)
    body = {"image": uri(saved(start)), "seed": 3}
    kept = np.asarray(start).astype(int)
    near, far = (np.abs(drawn(working, strength=s, **body) - kept).mean() for s in (0.1, 0.9))
    assert 0 < near < far / 3
    masked = drawn(working, mask_image=uri(saved(half_mask())), **body)
    assert np.array_equal(masked[:, :256], kept[:, :256])
    assert np.abs(masked[:, 256:] - kept[:, 256:]).mean() > 1


def test_the_result_has_the_size_asked_for(working: Stack) -> None:
    """A start picture of another shape is scaled and cropped to it."""
    assert drawn(working, image=uri(saved(noise(900, 300))), size="768*512").shape == (512, 768, 3)


def test_start_pictures_go_when_their_job_has_ended(working: Stack) -> None:
    """Nothing of what a client sent is kept after the result is there."""
    drawn(working, image=uri(PNG), mask_image=uri(saved(half_mask().resize(PICTURE.size))))
    until = time.monotonic() + 10
    while inputs(working) and time.monotonic() < until:  # it happens right after the result is to be seen
        time.sleep(0.02)
    assert inputs(working) == []


def test_a_job_whose_picture_is_gone_fails_by_its_name(serve: Serve) -> None:
    """Somebody has emptied the folder: the owner reads what to do."""
    with serve() as stack:
        prediction = submit(stack.client(), image=uri(PNG))
        [file] = inputs(stack)
        file.unlink()
        with stack.worker():
            done = submit(stack.client(), enable_sync_mode=True, num_inference_steps=1)
            assert done["status"] == "completed"
        failed = read(stack.client(), prediction)
        assert failed["status"] == "failed"
        assert failed["error"] == 'Error at "/image": is not stored any more; submit the request again'
        assert failed["code"] == 1402
