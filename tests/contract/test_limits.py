"""Limits over the wire: 429 and 503 with a time to come back, polls never refused, and room again by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import text

from impasto.api.limits import DiskRoom
from impasto.errors import Unavailable
from impasto.jobs.database import reading
from impasto.jobs.limits import KeyLimits

from .conftest import MODEL, Stack, picture, read, refusal, serving, submit

Serve = Callable[..., AbstractContextManager[Stack]]
SUBMIT = f"/api/v3/{MODEL}"
BODY = {"prompt": "a red fox", "size": "512*512"}


def retry_after(answer: httpx.Response) -> int:
    return int(answer.headers["retry-after"])


def send_form(client: httpx.Client) -> httpx.Response:
    return client.post("/api/v3/media/upload/binary", files={"file": ("fox.png", picture(64, 64, 1), "image/png")})


def test_submits_and_uploads_have_a_rate_and_polls_have_none(serve: Serve) -> None:
    """The fourth is refused with the limit in the message; a hundred polls are not."""
    with serve(rate_per_minute=3) as stack:
        client = stack.client()
        made = submit(client)
        assert send_form(client).status_code == 200
        assert client.post("/api/v2/media/uploads", json={"filename": "fox.png"}).status_code == 200
        for answer in (client.post(SUBMIT, json=BODY), send_form(client)):
            assert "3 requests a minute" in refusal(answer, 429)
            assert 1 <= retry_after(answer) <= 20
        for _ in range(100):
            read(client, made)
        assert client.post("/api/v3/predictions").status_code == 200
        assert client.delete(f"/api/v3/predictions/{made['id']}").status_code == 200
        submit(stack.client(stack.new_key()))


def test_the_openai_dialect_refuses_in_its_own_form(serve: Serve) -> None:
    """With the same header, which its clients obey."""
    with serve(rate_per_minute=1) as stack:
        submit(stack.client())
        with (
            openai.OpenAI(api_key=stack.key, base_url=f"{stack.url}/v1", max_retries=0) as client,
            pytest.raises(openai.RateLimitError, match="1 requests a minute") as refused,
        ):
            client.images.generate(prompt="a fox", model="sdxl", size="512x512")
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60


def test_a_days_work_is_refused_until_the_next_day(serve: Serve) -> None:
    """By the work that is asked for: four pictures of a quarter of the default size are one."""
    with serve(daily_pictures=1) as stack:
        client = stack.client()
        submit(client, num_images=3)
        answer = client.post(SUBMIT, json=BODY | {"num_images": 2})
        assert "1 default pictures a day (UTC) and had 0.75 today" in refusal(answer, 429)
        assert 0 < retry_after(answer) <= 86_400
        submit(client)
        assert "ask for fewer" in refusal(client.post(SUBMIT, json=BODY | {"size": "1536*1536"}), 400)


def test_a_key_has_limits_of_its_own(serve: Serve) -> None:
    """They go before the settings."""
    with serve(rate_per_minute=1) as stack:
        free = stack.client(stack.keys.create("free", limits=KeyLimits(rate=0, queued=2)))
        for _ in range(2):
            submit(free)
        assert "2 jobs of this key are waiting" in refusal(free.post(SUBMIT, json=BODY), 429)


def test_a_running_limit_comes_from_the_settings_to_the_workers(serve: Serve) -> None:
    """The API writes it down with the job, so that workers elsewhere need no setting for it."""
    with serve(max_running=2) as stack:
        client = stack.client()
        for _ in range(4):
            submit(client)
        submit(stack.client(stack.new_key()))
        assert len(stack.claim()) == 3


def test_a_server_that_is_full_for_everybody_says_503(serve: Serve) -> None:
    """And takes jobs again when some have begun."""
    with serve(max_waiting=2) as stack:
        client = stack.client()
        submit(client)
        submit(stack.client(stack.new_key()))
        answer = client.post(SUBMIT, json=BODY)
        assert "2 jobs are waiting on this server" in refusal(answer, 503)
        assert retry_after(answer) > 0
        stack.work_off()
        submit(client)


# A full disk


def test_too_little_free_space_refuses_what_would_need_more(serve: Serve) -> None:
    """Before anything is written; polls, deletes and cancels go on, since they free space."""
    with serve(min_free_bytes=2**60) as stack:
        client = stack.client()
        for answer in (
            client.post(SUBMIT, json=BODY),
            send_form(client),
            client.post("/api/v3/media/uploads", json={"filename": "fox.png"}),
        ):
            assert "disk is full" in refusal(answer, 503)
            assert retry_after(answer) > 0
        assert client.post("/api/v3/predictions").json()["data"]["total"] == 0
        assert client.post("/api/v3/predictions/delete", json={"ids": []}).status_code == 200
        assert not list(stack.outputs.older("uploads/", 0))


def test_a_folder_that_is_not_there_yet_has_its_parents_room(tmp_path: Path) -> None:
    """The check runs before the first start has made anything."""
    free = shutil.disk_usage(tmp_path).free
    DiskRoom(0, tmp_path / "a" / "b").check(free // 2)
    with pytest.raises(Unavailable):
        DiskRoom(free // 2, tmp_path / "a" / "b").check(free)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", f"impasto-{uuid.uuid4().hex}", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_really_fills_up_loses_nothing(small_disk: Path) -> None:
    """What was taken is kept, what is not is refused with 503, and with room again the service goes on by itself."""
    with serving(small_disk, min_free_bytes=8 * 2**20) as stack:
        client = stack.client()
        kept = [submit(client) for _ in range(3)]
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4 * 2**20))
        for answer in (client.post(SUBMIT, json=BODY), send_form(client)):
            assert "disk is full" in refusal(answer, 503)
        assert [read(client, job)["status"] for job in kept] == ["created"] * 3
        ballast.unlink()
        submit(client)
        stack.work_off()
        assert read(client, kept[0])["status"] == "completed"


def test_a_disk_that_fills_up_in_the_middle_of_a_request_is_503_too(small_disk: Path) -> None:
    """The check before is no promise: somebody else may write. Nothing half-written stays."""
    with serving(small_disk, min_free_bytes=0) as stack:
        client = stack.client()
        submit(client)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            while shutil.disk_usage(small_disk).free:
                file.write(bytes(min(2**20, shutil.disk_usage(small_disk).free)))
        start = {"image": client_picture(), "strength": 0.5}
        for answer in (client.post(SUBMIT, json=BODY), client.post(SUBMIT, json=BODY | start), send_form(client)):
            refusal(answer, 503)
            assert retry_after(answer) > 0
        ballast.unlink()
        submit(client)
        assert send_form(client).status_code == 200
        with reading(stack.store.engine) as db:
            assert db.execute(text("select count(*) from predictions")).scalar_one() == 2


def client_picture() -> str:
    """A start picture as a request carries it."""
    import base64

    return base64.b64encode(picture(512, 512, 3)).decode()
