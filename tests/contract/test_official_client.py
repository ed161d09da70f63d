"""The official ``wavespeed`` client from PyPI, unmodified, over a real socket: only its base URL is ours."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import wavespeed
from PIL import Image

from .conftest import MODEL, Stack

REQUEST = {"prompt": "a red fox on a blue background", "size": "512*768", "seed": 5, "num_images": 2}


@pytest.fixture(scope="module", autouse=True)
def worker(stack: Stack) -> Iterator[None]:
    """A worker runs, and no proxy stands between."""
    with pytest.MonkeyPatch.context() as patch, stack.worker():
        patch.setenv("NO_PROXY", "*")
        yield


@pytest.fixture
def official(stack: Stack) -> wavespeed.Client:
    """The client as a user makes it."""
    return wavespeed.Client(api_key=stack.key, base_url=stack.url)


def opened(data: bytes) -> tuple[str | None, tuple[int, int]]:
    """Format and size of a picture that really decodes."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image.format, image.size


def run(client: wavespeed.Client, **more: Any) -> list[str]:
    """Run a request to its end; return the outputs."""
    return client.run(MODEL, REQUEST | more.pop("body", {}), poll_interval=0.05, **more)["outputs"]


def test_run_gives_urls_that_anyone_can_fetch(official: wavespeed.Client) -> None:
    """Submit, poll, result; the URLs need no key and hold pictures of the size asked for."""
    outputs = run(official)
    assert len(outputs) == 2
    for url in outputs:
        assert opened(httpx.get(url, trust_env=False).content) == ("PNG", (512, 768))


def test_run_gives_base64(official: wavespeed.Client) -> None:
    """The same pictures, in the answer itself."""
    inline = run(official, body={"enable_base64_output": True})
    linked = [httpx.get(url, trust_env=False).content for url in run(official)]
    assert [base64.b64decode(text, validate=True) for text in inline] == linked


def test_run_with_a_start_picture(official: wavespeed.Client) -> None:
    """A picture as data URI, and a mask that keeps it all but for one corner: the result is that picture."""
    start, mask = Image.new("RGB", (512, 768), (10, 200, 30)), Image.new("L", (512, 768))
    mask.paste(255, (0, 0, 64, 64))
    body = {"image": uri(start), "mask_image": uri(mask), "strength": 0.9, "num_images": 1}
    [url] = run(official, body=body)
    drawn = Image.open(io.BytesIO(httpx.get(url, trust_env=False).content))
    assert drawn.getpixel((32, 32)) != (10, 200, 30)
    assert drawn.crop((64, 0, 512, 768)).getcolors() == [(448 * 768, (10, 200, 30))]


def uri(image: Image.Image) -> str:
    """The picture as a client sends it."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def test_sync_mode(official: wavespeed.Client) -> None:
    """One request, answered when done."""
    assert len(run(official, enable_sync_mode=True)) == 2


def test_get_result_reads_a_prediction_again(official: wavespeed.Client, stack: Stack) -> None:
    """A finished task can be read by its id, with all its fields."""
    done = official.run_no_throw(MODEL, REQUEST, poll_interval=0.05)
    assert (done["status"], done["error"]) == ("completed", None)
    data = official.get_result(done["task_id"])["data"]
    assert (data["id"], data["outputs"], data["seed"]) == (done["task_id"], done["outputs"], 5)


def test_a_wrong_key(stack: Stack) -> None:
    """The client's error tells the user what the header should be."""
    with pytest.raises(RuntimeError, match=r"HTTP 401: .*Authorization: Bearer"):
        run(wavespeed.Client(api_key="0" * 64, base_url=stack.url))


def test_a_bad_parameter(official: wavespeed.Client) -> None:
    """The client's error names the field."""
    with pytest.raises(RuntimeError, match=r"HTTP 400: .*/num_inference_steps.*between 1 and 50, got 99"):
        run(official, body={"num_inference_steps": 99})
