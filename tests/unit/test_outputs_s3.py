"""Files in a bucket: what holds for a folder holds there, and a bucket that is away says so soon."""

import time

import pytest

from impasto.errors import NotFound, Unavailable
from impasto.jobs import outputs as module
from impasto.jobs.outputs import OutputStore
from tests.s3 import S3, s3_server

JOB = "0" * 31 + "1"


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def outputs(server: S3, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return OutputStore(server.url)


def test_pictures_go_in_and_come_out(outputs, server):
    """Whole or in parts, below the prefix, and under the name that was given."""
    blob = outputs.put(JOB, 1, 0, b"picture" * 1000, "image/png")
    assert outputs.get(blob) == b"picture" * 1000
    assert outputs.size(blob) == 7000
    assert b"".join(outputs.chunks(blob, 3, 7)) == b"ture"
    assert outputs.local(blob) is None
    assert f"prefix/{blob}" in server.names()


def test_a_large_file_is_read_in_chunks(outputs, tmp_path):
    """An upload of more than one part arrives as it was sent."""
    file = tmp_path / "lora.safetensors"
    file.write_bytes(bytes(range(256)) * 2**15 * 2)
    name = outputs.put_upload(file, module.LORA_TYPE)
    assert b"".join(outputs.chunks(name, 0, outputs.size(name))) == file.read_bytes()


def test_nothing_is_written_over(outputs, monkeypatch):
    """Even if two names came out the same; the bucket itself refuses it."""
    monkeypatch.setattr(module.secrets, "token_hex", lambda n: "b" * 2 * n)
    blob = outputs.put(JOB, 1, 0, b"first", "image/png")
    with pytest.raises(Unavailable):
        outputs.put(JOB, 1, 0, b"second", "image/png")
    assert outputs.get(blob) == b"first"


def test_what_is_deleted_is_gone_and_what_is_old_is_listed(outputs):
    """A sweep finds a job's files by their beginning; deleting twice is fine."""
    job = "0" * 31 + "2"
    blobs = {outputs.put(job, attempt, 0, b"x", "image/png") for attempt in (1, 2)}
    outputs.put(JOB, 1, 0, b"x", "image/png")
    time.sleep(1.1)  # a bucket's times are whole seconds
    assert set(outputs.older(f"{job}/", 0)) == blobs
    assert list(outputs.older(f"{job}/", 3600)) == []
    for _ in range(2):
        outputs.delete(blobs)
    with pytest.raises(NotFound):
        outputs.get(blobs.pop())


def test_a_probe_leaves_nothing(outputs, server):
    """It is a question."""
    before = server.names()
    outputs.probe()
    assert server.names() == before


def test_a_bucket_that_is_not_there_says_try_again(outputs, monkeypatch):
    """Soon enough to tell a client so, and not "no such file", which would be believed."""
    monkeypatch.setattr(module, "RETRY_SECONDS", 1)
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    away, began = OutputStore("s3://pictures/prefix"), time.monotonic()
    for act in (lambda: away.put(JOB, 1, 0, b"x", "image/png"), lambda: away.get(f"{JOB}/1-{'a' * 32}/0.png")):
        with pytest.raises(Unavailable):
            act()
    with pytest.raises(Unavailable):
        away.probe()
    assert time.monotonic() - began < 15


def test_a_server_without_the_bucket_says_try_again_too(outputs):
    """It may be starting; only a bucket that is there can say that a file of its is not."""
    away, blob = OutputStore("s3://another/prefix"), f"{JOB}/1-{'a' * 32}/0.png"
    with pytest.raises(Unavailable):
        away.put(JOB, 1, 0, b"x", "image/png")
    with pytest.raises(Unavailable):
        away.get(blob)
    with pytest.raises(Unavailable):
        away.probe()
    with pytest.raises(NotFound):
        outputs.get(blob)
