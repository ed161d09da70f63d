"""Over HTTP, with the real worker: flagged pictures keep their place and show nothing, wherever one may look."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

from impasto.images import encode_image, encode_png
from impasto.safety.checker import Verdict
from impasto.safety.denylist import DenyList
from impasto.safety.gate import SafetyGate
from impasto.types import Event, GenerationRequest, ImageReady, Preview, seed_of_image
from impasto.worker.backend import FakeBackend
from impasto.worker.previews import thumbnail
from tests.receiver import receiving

from .conftest import MODEL, Stack, submit

Serve = Callable[..., AbstractContextManager[Stack]]
SCRIPT = [0.1, 0.9, 0.1, 0.9]
FLAGS = [False, True, False, True]
BLACK = (0, 0, 0)
NEEDLE = 24  # bytes that cannot be there by chance


class Scripted:
    """Gives scores in order, flags from 0.5 on; raises or hangs where the score says so."""

    name, version = "scripted", "1"

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def check(self, images: Any) -> list[Verdict]:
        score = self.scores.pop(0)
        if score < 0:
            raise RuntimeError("the checker is broken")
        if score > 1:
            time.sleep(3)
        return [Verdict(score >= 0.5, score, self.name)]


def sentinel(seed: int, width: int = 512, height: int = 512) -> Image.Image:
    """Noise that is in no other picture: every few bytes of it, in any form, tell where they are from."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class SentinelBackend(FakeBackend):
    """Draws sentinels, and shows them in its previews."""

    def _previews(self, request_id: str, request: GenerationRequest, done: int) -> list[Event]:
        seeds = [seed_of_image(request.seed, i) for i in range(request.num_images)]
        return [Preview(request_id, i, done, sentinel(seed, 64, 64)) for i, seed in enumerate(seeds)]

    def _pictures(self, request_id: str, request: GenerationRequest) -> list[Event]:
        *ready, finished = super()._pictures(request_id, request)
        drawn = [event for event in ready if isinstance(event, ImageReady)]
        return [*(ImageReady(request_id, e.index, e.seed, sentinel(e.seed, *e.image.size)) for e in drawn), finished]


def worker(stack: Stack, gate: SafetyGate) -> AbstractContextManager[None]:
    """The real loop behind a gate."""
    return stack.worker(SentinelBackend(0.02), previews=True, safety=gate)


@pytest.fixture
def stack(serve: Serve) -> Iterator[Stack]:
    """A service of its own for each test, so that its folder holds this test's files alone."""
    with serve() as running:
        yield running


def ended(client: httpx.Client, made: dict[str, Any], seen: list[bytes] | None = None) -> dict[str, Any]:
    """Poll until the end; keep every answer in ``seen``."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        answer = client.get(made["urls"]["get"])
        if seen is not None:
            seen.append(answer.content)
        data: dict[str, Any] = answer.json()["data"]
        if data["status"] in ("completed", "failed"):
            return data
        time.sleep(0.02)
    raise AssertionError(f"still {data}")


def picture_of(output: str) -> Image.Image:
    """Read an output, a URL or base64."""
    data = httpx.get(output, trust_env=False).content if output.startswith("http") else base64.b64decode(output)
    return Image.open(io.BytesIO(data)).convert("RGB")


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and left.tobytes() == right.tobytes()


# In order, in every mode


@pytest.mark.parametrize("as_base64", [False, True])
@pytest.mark.parametrize("sync", [False, True])
def test_flags_and_pictures_keep_their_order(stack: Stack, as_base64: bool, sync: bool) -> None:
    """Four pictures, the second and the fourth flagged: black and true there, untouched and false elsewhere."""
    with worker(stack, SafetyGate(Scripted(*SCRIPT))):
        http = stack.client()
        body = {"num_images": 4, "seed": 7, "enable_base64_output": as_base64, "enable_sync_mode": sync}
        made = submit(http, num_inference_steps=2, **body)
        done = made if sync else ended(http, made)
    assert (done["status"], done["has_nsfw_contents"], done["error"]) == ("completed", FLAGS, "")
    for i, (output, flagged) in enumerate(zip(done["outputs"], FLAGS, strict=True)):
        assert same(picture_of(output), Image.new("RGB", (512, 512), BLACK) if flagged else sentinel(7 + i))


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_black_is_black_in_every_format(stack: Stack, file_format: str) -> None:
    """Of the asked size; lossy encoders do not lighten it."""
    with worker(stack, SafetyGate(Scripted(0.9))):
        http = stack.client()
        done = ended(http, submit(http, num_inference_steps=1, seed=1, output_format=file_format, size="768*512"))
    [output] = done["outputs"]
    assert same(picture_of(output), Image.new("RGB", (768, 512), BLACK))


def test_a_webhook_tells_the_same(serve: Serve) -> None:
    """Its flags are in the pictures' order, too."""
    with receiving() as receiver:
        allowed = {"webhook_allow": ["127.0.0.0/8"], "webhook_http": True, "webhook_ports": [receiver.port]}
        with serve(**allowed) as stack, worker(stack, SafetyGate(Scripted(*SCRIPT))):
            model = f"{MODEL}?webhook={quote(receiver.url, safe='')}"
            submit(stack.client(), model, num_images=4, num_inference_steps=1, seed=7)
            [call] = receiver.wait(1)
            told = json.loads(call.body)
            assert told["has_nsfw_contents"] == FLAGS
            shown = [picture_of(output) for output in told["outputs"]]
    assert [same(image, Image.new("RGB", (512, 512), BLACK)) for image in shown] == FLAGS


def test_a_request_may_do_without_where_the_operator_lets_it(stack: Stack) -> None:
    """``enable_safety_checker: false`` gives the picture and ``false``; where it is forbidden, black and ``true``."""
    for allowed in (True, False):
        with worker(stack, SafetyGate(Scripted(0.9), allow_disable=allowed)):
            http = stack.client()
            made = submit(http, num_inference_steps=1, seed=int(allowed), enable_safety_checker=False)
            done = ended(http, made)
        assert done["has_nsfw_contents"] == [not allowed]
        wanted = sentinel(1) if allowed else Image.new("RGB", (512, 512), BLACK)
        assert same(picture_of(done["outputs"][0]), wanted)


# Refusals


def refused(stack: Stack, gate: SafetyGate, **body: Any) -> dict[str, Any]:
    """Submit a job that must fail, and see that nothing of it is left."""
    with worker(stack, gate):
        http = stack.client()
        done = ended(http, submit(http, **({"num_inference_steps": 1, "num_images": 2, "seed": 1} | body)))
    assert (done["status"], done["outputs"], done["has_nsfw_contents"]) == ("failed", [], [])
    assert files_of(stack, "outputs") == []
    return done


def files_of(stack: Stack, folder: str = "") -> list[Any]:
    return [path for path in (stack.settings.data_dir / folder).rglob("*") if path.is_file()]


def test_a_flagged_picture_may_end_the_prediction(stack: Stack) -> None:
    """With the code for content moderation; the harmless picture before it is not kept."""
    done = refused(stack, SafetyGate(Scripted(0.1, 0.9), action="error"))
    assert done["code"] == 1200
    assert "safety checker" in done["error"]


@pytest.mark.parametrize("score", [-1.0, 2.0], ids=["raises", "hangs"])
def test_a_checker_that_does_not_work_ends_the_prediction(stack: Stack, score: float) -> None:
    """Nothing is stored, not even the picture that it had passed before; the next job is served."""
    gate = SafetyGate(Scripted(0.1, score, 0.1), seconds=0.5)
    done = refused(stack, gate)
    assert done["code"] == 1403
    assert "broken" not in done["error"]
    with worker(stack, gate):
        http = stack.client()
        assert ended(http, submit(http, num_inference_steps=1, seed=3))["status"] == "completed"


def test_a_flagged_start_picture_is_refused_and_deleted(stack: Stack) -> None:
    """Before a step is made, with the field's name."""
    start = base64.b64encode(encode_png(sentinel(5))).decode()
    done = refused(stack, SafetyGate(Scripted(0.9), check_inputs=True), image=start)
    assert done["code"] == 1200
    assert done["error"].startswith("image")


def test_a_prompt_of_the_deny_list_is_refused(stack: Stack) -> None:
    """As a wrong value of the field, whatever the request says of the checker; nothing is drawn."""
    gate = SafetyGate(denylist=DenyList(["red fox"]))
    done = refused(stack, gate, prompt="A Red-Fox, sitting", enable_safety_checker=False)
    assert done["code"] == 1401
    assert done["error"].startswith("Error at \"/prompt\": has 'red fox'")


# Leaks


def needles(image: Image.Image) -> list[bytes]:
    """Bytes that are there where a picture is: raw, in a file of each format, small, hashed, and each in base64."""
    encoded = [encode_image(image, kind) for kind in ("png", "jpeg", "webp")]
    hashes = [hashlib.sha256(data).hexdigest().encode() for data in (image.tobytes(), *encoded)]
    slices = [data[len(data) // 2 :][:NEEDLE] for data in (image.tobytes(), *encoded)]
    texts = [base64.b64encode(piece[shift:])[:NEEDLE] for piece in slices for shift in (0, 1, 2)]
    return [*hashes, *slices, *texts]


def preview_needles(seed: int) -> list[bytes]:
    """Bytes of a preview, as it is stored and sent."""
    data = thumbnail(Preview("", 0, 1, sentinel(seed, 64, 64))).image
    return [data[len(data) // 2 :][:NEEDLE].encode()]


def places(stack: Stack, answers: list[bytes], log: str) -> bytes:
    """Everything that a flagged picture could have got to, as bytes: files, database, answers, outputs, log."""
    parts = [path.read_bytes() for path in files_of(stack)]
    return b"\n".join([*parts, *answers, log.encode()])


def everywhere(stack: Stack, gate: SafetyGate, caplog: pytest.LogCaptureFixture, **body: Any) -> tuple[bytes, dict]:
    """Run a job of four pictures, look at it in every way there is, and return all that can be found."""
    caplog.set_level(logging.DEBUG)
    answers: list[bytes] = []
    with worker(stack, gate):
        http = stack.client()
        made = submit(http, num_images=4, seed=7, num_inference_steps=30, **body)
        done = ended(http, made, answers)
        for output in done["outputs"]:
            answers.append(httpx.get(output, trust_env=False).content if output.startswith("http") else b"")
        found = places(stack, answers, caplog.text)
    return found, done


@pytest.mark.parametrize(
    ("action", "as_base64", "file_format"), [("black", False, "png"), ("blur", True, "jpeg"), ("blur", False, "webp")]
)
def test_nothing_of_a_flagged_picture_is_found_anywhere(
    stack: Stack, caplog: pytest.LogCaptureFixture, action: Any, as_base64: bool, file_format: str
) -> None:
    """Not in the output folder, the database and its log, the answers, the served files, the log, the previews."""
    gate = SafetyGate(Scripted(*SCRIPT), action=action, previews=False)
    body = {"enable_base64_output": as_base64, "output_format": file_format}
    found, done = everywhere(stack, gate, caplog, **body)
    assert done["has_nsfw_contents"] == FLAGS
    for i, flagged in enumerate(FLAGS):
        present = [needle for needle in needles(sentinel(7 + i)) if needle in found]
        assert bool(present) is not flagged, "a picture that passed is found: the search can see"
        assert not any(needle in found for needle in preview_needles(7 + i))


def test_the_search_finds_previews_where_they_are_shown(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    """Positive control: with previews allowed, as by default, they are in the database while the job runs."""
    seen: list[bytes] = []

    class Watching(Scripted):
        def check(self, images: Any) -> list[Verdict]:
            seen.append(places(stack, [], ""))
            return super().check(images)

    found, _ = everywhere(stack, SafetyGate(Watching(*SCRIPT)), caplog)
    assert any(needle in found + seen[0] for i in range(4) for needle in preview_needles(7 + i))


def test_files_that_decode_to_a_flagged_picture_are_none(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever their bytes: none of the stored pictures looks like the flagged one."""
    everywhere(stack, SafetyGate(Scripted(*SCRIPT)), caplog)
    stored = [Image.open(path).convert("RGB") for path in files_of(stack, "outputs")]
    assert len(stored) == 4
    for i, flagged in enumerate(FLAGS):
        likest = max(likeness(sentinel(7 + i), image) for image in stored)
        assert likest == (0 if flagged else 1)


def likeness(left: Image.Image, right: Image.Image) -> float:
    """Return the correlation of two pictures to two decimals, 0 with a flat one."""
    one, other = (np.asarray(image, dtype=float).ravel() for image in (left, right))
    return 0.0 if other.std() == 0 else round(abs(float(np.corrcoef(one, other)[0, 1])), 2)
