"""Finished pictures as files: their headers, parts of them, and their end."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from impasto.jobs.outputs import OutputStore

from .conftest import Stack, read, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]


def made(stack: Stack, **body: Any) -> dict[str, Any]:
    """A completed prediction."""
    prediction = submit(stack.client(), **body)
    stack.work_off()
    return read(stack.client(), prediction)


@pytest.fixture(scope="module")
def url(stack: Stack) -> str:
    """The address of a finished picture."""
    return str(made(stack)["outputs"][0])


@pytest.mark.parametrize(("kind", "ending"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")])
def test_a_picture_is_served_as_what_it_is(stack: Stack, kind: str, ending: str) -> None:
    """Without a key, with its type, and HEAD says the same as GET without the bytes."""
    [url] = made(stack, output_format=kind)["outputs"]
    assert url.endswith(ending)
    got, head = httpx.get(url), httpx.head(url)
    assert (got.status_code, head.status_code) == (200, 200)
    assert got.headers["content-type"] == f"image/{kind}"
    assert head.content == b""
    different = {"date", "x-request-id"}
    assert {n: v for n, v in got.headers.items() if n not in different} == {
        n: v for n, v in head.headers.items() if n not in different
    }
    assert int(head.headers["content-length"]) == len(got.content)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-9", 0, 10), ("bytes=10-", 10, None), ("bytes=-7", -7, None), ("bytes=5-99999999", 5, None)],
)
def test_a_part_of_a_picture_can_be_had(url: str, asked: str, start: int, end: int | None) -> None:
    """One range, by 206."""
    whole = httpx.get(url).content
    part = httpx.get(url, headers={"Range": asked})
    assert (part.status_code, part.content) == (206, whole[start:end])
    first = start % len(whole)
    assert part.headers["content-range"] == f"bytes {first}-{first + len(part.content) - 1}/{len(whole)}"
    assert int(httpx.head(url, headers={"Range": asked}).headers["content-length"]) == len(part.content)


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=-", "bytes=0-1,4-5", "lines=0-1", "bytes=x", "bytes=٣-٤"])
def test_ranges_that_are_none_are_passed_over(url: str, asked: str) -> None:
    """So are several at once: all bytes are a right answer."""
    answer = httpx.get(url, headers=[(b"Range", asked.encode())])
    assert (answer.status_code, answer.content) == (200, httpx.get(url).content)


def test_a_range_behind_the_end_is_416(url: str) -> None:
    """With the size, so that the client can ask again."""
    size = len(httpx.get(url).content)
    for asked in (f"bytes={size}-", "bytes=-0"):
        answer = httpx.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


def test_what_a_client_has_is_not_sent_again(stack: Stack, url: str) -> None:
    """By its tag; a part of another file is not put behind what the client has."""
    tag = httpx.get(url).headers["etag"]
    for known in (tag, f'W/{tag}, "x"', "*"):
        answer = httpx.get(url, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert httpx.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    assert httpx.get(url, headers={"Range": "bytes=0-1", "If-Range": tag}).status_code == 206
    assert httpx.get(url, headers={"Range": "bytes=0-1", "If-Range": '"x"'}).status_code == 200
    assert httpx.get(made(stack)["outputs"][0]).headers["etag"] != tag


def test_a_missing_picture_is_404(stack: Stack, url: str) -> None:
    """Also for a client that has it."""
    gone = url.replace("/0.png", "/1.png")
    assert "may have been deleted" in refusal(httpx.get(gone), 404)
    refusal(httpx.get(gone, headers={"If-None-Match": "*"}), 404)
    assert httpx.head(gone).status_code == 404


def test_pictures_expire_and_the_prediction_stays(serve: Serve) -> None:
    """After the setting's time the address is 404, the file is gone, and the prediction says when; a job that runs
    and a picture that is younger stay."""
    with serve(output_seconds=2) as stack:
        client = stack.client()
        old, coded = made(stack), made(stack, enable_base64_output=True)
        running = submit(client)
        [claimed] = stack.claim()
        blob = stack.outputs.put(claimed.id, claimed.attempt, 0, b"half done", "image/png")
        [url] = old["outputs"]
        first = httpx.get(url)
        assert (first.status_code, first.headers["cache-control"]) == (200, "private, max-age=2, immutable")
        until = time.monotonic() + 10
        while httpx.get(url).status_code == 200 and time.monotonic() < until:
            time.sleep(0.05)
        young = made(stack)
        refusal(httpx.get(url), 404)
        for expired in (old, coded):
            while "expired_at" not in (shown := read(client, expired)) and time.monotonic() < until:
                time.sleep(0.05)
            assert (shown["status"], shown["outputs"], shown["has_nsfw_contents"], shown["error"]) == (
                "completed", [], [], ""
            )  # fmt: skip
            assert shown["expired_at"] > shown["created_at"]
        assert httpx.get(young["outputs"][0]).status_code == 200
        assert stack.outputs.get(blob) == b"half done"
        assert read(client, running)["status"] == "processing"
        left = {file.parent.parent.name for file in Path(stack.settings.output_root).rglob("*.png")}
        assert left == {claimed.id, young["id"]}


# Base64


def test_base64_is_what_the_address_would_give(stack: Stack) -> None:
    """Naked and standard, for each picture, on every way to the prediction; otherwise it is like any other."""
    urls = made(stack, num_images=3, seed=5)
    coded = made(stack, num_images=3, seed=5, enable_base64_output=True)
    assert [base64.b64decode(text, validate=True) for text in coded["outputs"]] == [
        httpx.get(url).content for url in urls["outputs"]
    ]
    assert set(coded) == set(urls)
    assert coded["has_nsfw_contents"] == [False] * 3
    for version in ("v2", "v3"):
        for ending in ("", "/result"):
            again = stack.client().get(f"/api/{version}/predictions/{coded['id']}{ending}").json()["data"]
            assert again["outputs"] == coded["outputs"]
            assert f"/api/{version}/" in again["urls"]["get"]


@pytest.mark.parametrize(("cached", "expected"), [(10**7, 1), (0, 9)])
def test_base64_is_encoded_once(serve: Serve, monkeypatch: pytest.MonkeyPatch, cached: int, expected: int) -> None:
    """However often and by however many at once it is fetched; the control: without a cache, each time."""
    get, reads = OutputStore.get, []

    def counted(self: OutputStore, blob: str) -> bytes:
        reads.append(blob)
        return get(self, blob)

    monkeypatch.setattr(OutputStore, "get", counted)
    with serve(base64_cache_bytes=cached) as stack:
        prediction = submit(stack.client(), enable_base64_output=True)
        stack.work_off()
        reads.clear()
        clients = [stack.client() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            bodies = set(pool.map(lambda client: client.get(prediction["urls"]["get"]).content, clients))
        bodies.add(clients[0].get(prediction["urls"]["get"]).content)
        assert len(bodies) == 1
        assert len(reads) == expected


def test_the_host_that_is_called_is_in_the_answer(stack: Stack) -> None:
    """A kept answer is not given to who calls the service by another name."""
    coded = made(stack, enable_base64_output=True)
    path = f"/api/v3/predictions/{coded['id']}"
    for host in ("a.example", "b.example"):
        answer = stack.client().get(path, headers={"Host": host}).json()["data"]
        assert answer["urls"]["get"].startswith(f"http://{host}/")
        assert answer["outputs"] == coded["outputs"]
