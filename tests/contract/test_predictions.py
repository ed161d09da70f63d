"""Reading predictions and pictures: what every client may rely on."""

from __future__ import annotations

import base64
import io

import httpx
import pytest
from PIL import Image

from .conftest import Stack, picture, read, refusal, submit


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("ending", ["", "/result"])
def test_all_spellings_read_the_same_prediction(stack: Stack, http: httpx.Client, version: str, ending: str) -> None:
    """Both versions, with and without /result; urls.get stays in the version that was asked."""
    data = submit(http)
    answer = http.get(f"/api/{version}/predictions/{data['id']}{ending}")
    assert answer.status_code == 200
    get = f"{stack.url}/api/{version}/predictions/{data['id']}/result"
    shown = answer.json()["data"]
    shown.pop("queue_position", None)  # known a moment after the submit
    assert shown == data | {"urls": {"get": get}}
    assert answer.headers["cache-control"] == "no-store"


def test_a_completed_prediction(stack: Stack, http: httpx.Client) -> None:
    """One URL and one verdict per picture, whole milliseconds, no leftovers of a running job."""
    data = submit(http, num_images=3, seed=7)
    stack.work_off()
    done = read(http, data)
    assert (done["status"], done["error"], done["seed"]) == ("completed", "", 7)
    assert done["has_nsfw_contents"] == [False] * 3
    assert done["timings"] == {"inference": 1234}
    assert type(done["executionTime"]) is int
    assert done["executionTime"] >= 0
    assert "progress" not in done
    assert "code" not in done
    assert len(set(done["outputs"])) == 3
    for index, url in enumerate(done["outputs"]):
        assert httpx.get(url, trust_env=False).content == picture(512, 512, 7 + index)


def test_flagged_pictures_keep_their_place(stack: Stack, http: httpx.Client) -> None:
    """The verdicts line up with the outputs."""
    data = submit(http, num_images=2)
    for job in stack.claim():
        stack.complete(job, nsfw=job.id == data["id"])
    assert read(http, data)["has_nsfw_contents"] == [True, True]


def test_a_running_prediction_tells_its_progress(stack: Stack, http: httpx.Client) -> None:
    """Before a worker has it: created. Then: processing, with the step the worker last reported."""
    data = submit(http)
    jobs = stack.claim()
    assert read(http, data)["status"] == "processing"
    stack.store.heartbeat("test-worker", {job.lease: {"step": 3, "total": 30} for job in jobs}, 60.0)
    running = read(http, data)
    assert running["progress"] == {"step": 3, "total": 30}
    assert (running["outputs"], running["has_nsfw_contents"], running["error"]) == ([], [], "")
    for job in jobs:
        stack.complete(job)


@pytest.mark.parametrize(("error_class", "code"), [("ModelError", 1403), ("worker_lost", 1403), ("LoraError", 1401)])
def test_a_failed_prediction_is_http_200(stack: Stack, http: httpx.Client, error_class: str, code: int) -> None:
    """The request to read it worked; the failure is in status, error and code."""
    data = submit(http)
    for job in stack.claim():
        stack.store.fail(job.lease, "the picture cannot be made", error_class)
    failed = read(http, data)
    assert (failed["status"], failed["error"], failed["code"]) == ("failed", "the picture cannot be made", code)
    assert (failed["outputs"], failed["has_nsfw_contents"]) == ([], [])


def test_a_cancelled_prediction_is_shown_as_failed(stack: Stack, http: httpx.Client) -> None:
    """Half of the clients know no other end and would poll for hours."""
    data = submit(http)
    stack.store.cancel(data["id"], stack.store.get(data["id"]).key_id)
    cancelled = read(http, data)
    assert (cancelled["status"], cancelled["code"]) == ("failed", 1405)
    assert cancelled["error"].startswith("cancelled")


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_pictures_are_keyless_and_harmless(stack: Stack, http: httpx.Client, kind: str, magic: bytes) -> None:
    """A plain GET without a key gives the picture with its type, and headers under which it can be nothing else."""
    data = submit(http, output_format=kind)
    stack.work_off()
    (url,) = read(http, data)["outputs"]
    assert url.startswith(f"{stack.url}/outputs/")
    extension = {"jpeg": "jpg"}.get(kind, kind)
    assert url.endswith(f".{extension}")
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 200
    assert answer.content.startswith(magic)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert answer.headers["cache-control"].startswith("private")
    assert answer.headers["content-disposition"] == f'inline; filename="{data["id"]}-0.{extension}"'
    assert "access-control-allow-origin" not in answer.headers
    head = httpx.head(url, trust_env=False)
    assert (head.status_code, head.content, head.headers["content-type"]) == (200, b"", f"image/{kind}")


def test_picture_urls_cannot_be_guessed(stack: Stack, http: httpx.Client) -> None:
    """128 random bits stand in the path: knowing the id, the attempt and another picture's URL is not enough."""
    data = submit(http, num_images=2)
    stack.work_off()
    first, _ = read(http, data)["outputs"]
    folder, _, name = first.rpartition("/")
    secret = folder.rpartition("-")[2]
    assert len(bytes.fromhex(secret)) == 16
    forged = folder.removesuffix(secret) + secret[::-1]
    assert httpx.get(f"{folder}/{name}", trust_env=False).status_code == 200
    refusal(httpx.get(f"{forged}/{name}", trust_env=False), 404)


OTHER_PATHS = ["", "x.png", "../a.db", "..%2fa.db", "%2e%2e/a.png", "a/b/c.png", "%00.png", "x" * 5000]


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_paths_that_are_no_picture_are_404(stack: Stack, path: str) -> None:
    """Nothing outside the pictures can be named."""
    refusal(httpx.get(f"{stack.url}/outputs/{path}", trust_env=False), 404)


def test_base64_is_the_same_bytes_naked(stack: Stack, http: httpx.Client) -> None:
    """No data: prefix, no line breaks; decoding gives the very file a URL would have given."""
    data = submit(http, enable_base64_output=True, seed=42, num_images=2)
    stack.work_off()
    outputs = read(http, data)["outputs"]
    assert [base64.b64decode(text, validate=True) for text in outputs] == [picture(512, 512, 42), picture(512, 512, 43)]
    assert Image.open(io.BytesIO(base64.b64decode(outputs[0]))).size == (512, 512)


def test_another_keys_prediction_is_not_found(stack: Stack, http: httpx.Client) -> None:
    """The refusal is the same, word for word, as for one that never was."""
    data = submit(http)
    other = stack.client(stack.new_key())
    theirs = refusal(other.get(f"/api/v3/predictions/{data['id']}/result"), 404)
    assert theirs == refusal(other.get(f"/api/v3/predictions/{'0' * 32}/result"), 404)
    assert read(http, data)["id"] == data["id"]


@pytest.mark.parametrize("prediction_id", ["nonsense", "A" * 32, "0" * 31, "%00", "a%2f..%2fb", "0" * 5000])
def test_ids_that_are_none_are_404(http: httpx.Client, prediction_id: str) -> None:
    """Whatever stands where an id should be, the answer is the same."""
    refusal(http.get(f"/api/v2/predictions/{prediction_id}/result"), 404)


def test_polling_is_never_refused(stack: Stack, http: httpx.Client) -> None:
    """Several clients give a running job up at the first 429 or 5xx of a poll."""
    data = submit(http)
    assert {http.get(data["urls"]["get"]).status_code for _ in range(200)} == {200}
