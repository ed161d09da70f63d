"""The client of our own API, against a real server: one job for one submit, every event, clear refusals, one host."""

import io
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from PIL import Image

from impasto.client import Client, read_url
from impasto.errors import (
    BadRequest,
    ConfigError,
    ImpastoError,
    NotFound,
    PredictionFailed,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from impasto.models.catalog import BUILTIN_FOLDER
from impasto.prediction import Glimpse, Prediction, Step
from impasto.worker.backend import FakeBackend
from tests.contract.conftest import MODEL, Stack, serving

LORA = BUILTIN_FOLDER / "loras" / "pixel-art.safetensors"
BODY = {"prompt": "a red fox", "size": "512*512", "num_inference_steps": 6, "seed": 3}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A server without a worker; tests that want pictures start one."""
    with serving(tmp_path_factory.mktemp("client")) as running:
        yield running


@pytest.fixture
def client(stack: Stack):
    """A client with a good key that waits for nothing."""
    with Client(stack.url, stack.key, patience=0) as made:
        yield made


def other_server(status: int, **headers: str) -> ThreadingHTTPServer:
    """Answer everything alike, and count."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.seen.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815  (the standard library's name)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def redirecting(stack: Stack):
    """A server that sends everybody to another one."""
    target = other_server(200)
    server = other_server(307, Location=f"http://127.0.0.1:{target.server_port}/api/v3/x")
    yield server, target
    for one in (server, target):
        one.shutdown()
        one.server_close()


def test_from_submit_to_picture(stack, client):
    """A job is followed through its steps and previews to its end, and its pictures are fetched."""
    with stack.worker(FakeBackend(step_seconds=0.3), previews=True):
        job = client.submit(MODEL, {**BODY, "num_images": 2})
        told = [update for update in client.follow(job.id) if update is not None]
    steps = [update for update in told if isinstance(update, Step)]
    assert steps and all(1 <= step.step <= step.total == 6 for step in steps)
    assert [step.step for step in steps] == sorted(step.step for step in steps)
    glimpses = [update for update in told if isinstance(update, Glimpse)]
    assert {glimpse.index for glimpse in glimpses} == {0, 1}
    assert Image.open(io.BytesIO(glimpses[0].image)).format == "JPEG"
    last = told[-1]
    assert isinstance(last, Prediction) and last.status == "completed" and last.check() is last
    assert (last.seed, last.flagged, len(last.outputs)) == (3, (False, False), 2)
    assert Image.open(io.BytesIO(client.download(last.outputs[1]))).size == (512, 512)


def test_a_job_that_waits_lets_its_caller_look_around(client):
    """While nothing happens, ``follow`` comes back every tick; leaving it ends its thread."""
    job = client.submit(MODEL, BODY)
    following = client.follow(job.id, tick=0.02)
    told = [next(following) for _ in range(30)]
    assert None in told and any(isinstance(update, Prediction) and update.status == "created" for update in told)
    name = f"events of {job.id}"
    assert name in {thread.name for thread in threading.enumerate()}  # the control
    following.close()
    deadline = time.monotonic() + 10
    while name in {thread.name for thread in threading.enumerate()}:
        assert time.monotonic() < deadline, "the thread is still there"
        time.sleep(0.01)
    client.cancel(job.id)


def test_an_error_in_the_block_cancels_the_job(client):
    """Whatever the block is left by, the server is told; left as meant, the job goes on."""
    kept, dropped = client.submit(MODEL, BODY), client.submit(MODEL, BODY)
    with client.cancelling(kept.id):
        pass
    with pytest.raises(KeyboardInterrupt), client.cancelling(dropped.id):
        raise KeyboardInterrupt
    assert client.result(kept.id).status == "created"
    ended = client.result(dropped.id)
    assert ended.ended and ended.error.startswith("cancelled")
    with pytest.raises(PredictionFailed, match=r"^cancelled"):
        ended.check()
    client.cancel(kept.id)


def test_a_job_that_has_ended_is_followed_to_its_end_at_once(client):
    """Following what is over tells the end and stops."""
    job = client.submit(MODEL, BODY)
    client.cancel(job.id)
    assert [update.status for update in client.follow(job.id) if update] == ["failed"]


def test_refusals_are_in_the_servers_words(stack, client):
    """A wrong value, an unknown id and a wrong key are three errors, each saying what is wrong."""
    with pytest.raises(BadRequest, match="num_inference_steps"):
        client.submit(MODEL, {**BODY, "num_inference_steps": 999})
    with pytest.raises(NotFound):
        client.result("0" * 32)
    with pytest.raises(NotFound):
        list(client.follow("0" * 32))
    with Client(stack.url, "wrong") as stranger, pytest.raises(Unauthorized):
        stranger.submit(MODEL, BODY)


def test_a_submit_is_one_job_however_often_it_is_sent(stack, monkeypatch):
    """A connection that breaks after the server took the request costs no second job."""
    waited, real = [], httpx.Client.request
    broken = iter([True, False])

    def request(self, *args, **options):
        answer = real(self, *args, **options)
        if next(broken):
            raise httpx.RemoteProtocolError("broken off")
        return answer

    monkeypatch.setattr(httpx.Client, "request", request)
    key = stack.new_key()
    with Client(stack.url, key, pause=waited.append) as own:
        job = own.submit(MODEL, BODY)
    monkeypatch.undo()
    listed = stack.client(key).post("/api/v3/predictions", json={}).json()["data"]["items"]
    assert [item["id"] for item in listed] == [job.id]
    assert waited == [0.5]


def test_a_full_server_is_asked_again_and_then_given_up(tmp_path):
    """429 is waited for as long as the server says, through the caller's own pause, and patience ends."""
    with serving(tmp_path / "full", max_queued=1) as stack:
        waited: list[float] = []
        with Client(stack.url, stack.key, pause=waited.append, patience=20) as client:
            client.submit(MODEL, BODY)
            with pytest.raises(TooManyRequests):
                client.submit(MODEL, BODY)
        assert waited and sum(waited) <= 20

        def make_room(_: float) -> None:
            stack.work_off()

        with Client(stack.url, stack.key, pause=make_room) as client:
            assert client.submit(MODEL, BODY).status == "created"


def test_a_server_that_is_away_says_where_it_was_looked_for():
    """The address is in the error, and what to do."""
    with Client("http://127.0.0.1:9", "key", patience=0) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9.*impasto serve"):
            client.submit(MODEL, BODY)
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
            list(client.follow("0" * 32))


def test_the_key_goes_to_one_host_alone(stack, client, redirecting):
    """A redirect is told and not followed; a picture is read from the server itself, without the key."""
    server, target = redirecting
    with Client(f"http://127.0.0.1:{server.server_port}", "secret", patience=0) as sent_away:
        with pytest.raises(BadRequest, match="redirects to"):
            sent_away.submit(MODEL, BODY)
        with pytest.raises(ImpastoError):
            list(sent_away.follow("0" * 32))
        with pytest.raises(BadRequest):
            sent_away.download(f"http://127.0.0.1:{target.server_port}/outputs/x.png")
    assert server.seen[0][1]["Authorization"] == "Bearer secret"  # the control: it is sent where it belongs
    assert server.seen[-1][0] == "/outputs/x.png" and "Authorization" not in server.seen[-1][1]
    assert target.seen == []
    with pytest.raises(NotFound):
        client.download("http://elsewhere.example/other/x.png")


def test_a_broken_stream_is_opened_again(stack):
    """A listener whose connection dies goes on where it was, and nobody notices."""
    with Client(stack.url, stack.key, patience=30) as client:
        job = client.submit(MODEL, BODY)
        following = client.follow(job.id, tick=0.05)
        assert next(update for update in following if update).status == "created"
        following.gi_frame.f_locals["listener"]._line.shutdown(socket.SHUT_RDWR)  # as a router does that forgets
        stack.work_off()
        assert [update.status for update in following if update][-1] == "completed"


def test_a_lora_is_sent_once_and_found(client):
    """An uploaded file has an address, is known to be there, and one that is not is known not to be."""
    url = client.upload(LORA)
    assert client.has_upload(url)
    assert not client.has_upload(url[:-20] + "0" * 20)


def test_a_file_that_is_no_lora_is_refused_in_words(client, tmp_path):
    """The server looks into the bytes."""
    (tmp_path / "fake.safetensors").write_bytes(b"hello")
    with pytest.raises(BadRequest, match="plain text"):
        client.upload(tmp_path / "fake.safetensors")


@pytest.mark.parametrize(
    "url",
    ["", "impasto.example", "ftp://x", "http://", "http://me@host", "https://h/?x=1", "http://h:port", "http://h/#a"],
)
def test_addresses_that_are_none(url):
    """What is no plain http or https address stops at once."""
    with pytest.raises(ConfigError, match="address"):
        read_url(url)


def test_a_server_below_a_path(redirecting):
    """The base address may have a path of its own."""
    server, _ = redirecting
    with (
        Client(f"http://127.0.0.1:{server.server_port}/impasto/", "k", patience=0) as client,
        pytest.raises(BadRequest),
    ):
        client.result("abc")
    assert server.seen[-1][0] == "/impasto/api/v3/predictions/abc/result"


def test_it_needs_no_torch():
    """The client starts in a moment, and on a machine without torch."""
    check = "import sys, impasto.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
