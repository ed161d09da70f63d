"""Image to video over the wire: the form, what is refused, what is stored, what comes back, and who may stop it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from impasto.safety.checker import Verdict
from impasto.safety.gate import SafetyGate
from impasto.types import GenerationRequest
from impasto.worker.backend import FakeBackend

from .conftest import Stack, read, refusal

Serve = Callable[..., AbstractContextManager[Stack]]
VIDEO = "wavespeed-ai/sdxl-lora/image-to-video"
PATH = f"/api/v3/{VIDEO}"
SMALL = {"prompt": "a frog", "size": "256*320", "num_inference_steps": 4, "frames": 9, "fps": 6, "seed": 7}


def start() -> str:
    """A start picture as a data URI."""
    data = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 30, 40)).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


@pytest.fixture(scope="module")
def running(stack: Stack) -> Iterator[Stack]:
    with stack.worker():
        yield stack


def made(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """A video that was asked for, whole."""
    answer = client.post(PATH, json=SMALL | {"image": start(), "enable_sync_mode": True} | body)
    assert answer.status_code == 200, answer.text
    prediction: dict[str, Any] = answer.json()["data"]
    assert prediction["status"] == "completed", prediction["error"]
    return prediction


def frames_of(data: bytes, kind: str = "webm") -> list[np.ndarray]:
    if kind == "webm":
        with av.open(io.BytesIO(data)) as container:
            return [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    opened = Image.open(io.BytesIO(data))
    shown = []
    for index in range(opened.n_frames):
        opened.seek(index)
        shown.append(np.asarray(opened.convert("RGB")))
    return shown


def test_a_video_has_the_frames_size_pace_and_seed_that_were_asked_for(running: Stack) -> None:
    """One output, a WebM, that begins with the start picture."""
    prediction = made(running.client())
    [url] = prediction["outputs"]
    assert url.endswith(".webm") and prediction["model"] == VIDEO and prediction["has_nsfw_contents"] == [False]
    assert prediction["seed"] == 7
    file = httpx.get(url, trust_env=False)
    assert file.headers["content-type"] == "video/webm" and file.headers["accept-ranges"] == "bytes"
    with av.open(io.BytesIO(file.content)) as container:
        assert container.streams.video[0].average_rate == 6
    frames = frames_of(file.content)
    assert len(frames) == 9 and frames[0].shape == (320, 256, 3)
    assert np.abs(frames[0].mean((0, 1)) - (200, 30, 40)).max() < 12
    assert np.abs(frames[-1].astype(int) - frames[0]).mean() > 10


def test_a_player_may_ask_for_a_part_of_the_file(running: Stack) -> None:
    """Browsers seek in videos by ranges."""
    [url] = made(running.client())["outputs"]
    part = httpx.get(url, headers={"Range": "bytes=0-3"}, trust_env=False)
    assert part.status_code == 206 and part.content == b"\x1a\x45\xdf\xa3"


def test_animated_webp_and_base64(running: Stack) -> None:
    """The other format, and the other way to hand it out."""
    prediction = made(running.client(), output_format="webp", enable_base64_output=True)
    data = base64.b64decode(prediction["outputs"][0])
    assert data[:4] == b"RIFF" and len(frames_of(data, "webp")) == 9


def test_what_is_not_given_has_the_defaults_of_the_form(stack: Stack) -> None:
    """16 frames, 8 a second, 512 px, 20 steps; the row holds what the worker needs."""
    answer = stack.client().post(PATH, json={"prompt": "a frog", "image": start()})
    job = stack.store.get(answer.json()["data"]["id"])
    request = GenerationRequest.from_json(job.input["request"])
    assert request.animation is not None and (request.animation.frames, request.animation.fps) == (16, 8)
    assert (request.width, request.height, request.num_inference_steps, request.num_images) == (512, 512, 20, 1)
    assert job.input["output"]["format"] == "webm" and list(job.input["pictures"]) == ["image"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"image": None}, "image"),
        ({"image": ""}, "image"),
        ({"image": "no picture"}, "image"),
        ({"prompt": None}, "prompt"),
        ({"frames": 7}, "frames"),
        ({"frames": 33}, "frames"),
        ({"frames": 8.5}, "frames"),
        ({"motion": "fly"}, "motion"),
        ({"fps": 0}, "fps"),
        ({"fps": 31}, "fps"),
        ({"size": "1536*512"}, "size"),
        ({"output_format": "mp4"}, "output_format"),
        ({"loras": [{"path": "a"}] * 6}, "loras"),
    ],
)
def test_what_is_wrong_is_refused_by_name(stack: Stack, body: dict[str, Any], field: str) -> None:
    """Before anything is stored."""
    answer = stack.client().post(PATH, json=SMALL | {"image": start()} | body)
    assert field in refusal(answer, 400)


def test_the_form_is_in_the_list_of_models_and_the_schema(stack: Stack) -> None:
    """Both are made from the one table."""
    listed = {model["model_id"]: model for model in stack.client().get("/api/v3/models").json()["data"]}
    schema = listed[VIDEO]["api_schema"]["api_schemas"][0]["request_schema"]
    assert listed[VIDEO]["type"] == "image-to-video" and schema["required"] == ["prompt", "image"]
    assert (schema["properties"]["frames"]["minimum"], schema["properties"]["frames"]["maximum"]) == (8, 32)
    assert schema["properties"]["output_format"]["enum"] == ["webm", "webp"]
    assert "num_images" not in schema["properties"] and "mask_image" not in schema["properties"]
    openapi = stack.client().get("/openapi.json").json()
    assert PATH in openapi["paths"] and f"/api/v2/{VIDEO}" in openapi["paths"]


def test_openais_dialect_has_no_videos(stack: Stack) -> None:
    """Its clients want pictures."""
    answer = stack.client().post("/v1/images/generations", json={"model": VIDEO, "prompt": "a frog"})
    assert answer.status_code == 404


def test_a_server_without_an_adapter_says_so_at_once(serve: Serve) -> None:
    """And what to start it with; pictures are taken."""
    with serve(motion_adapter="none") as other:
        answer = other.client().post(PATH, json=SMALL | {"image": start()})
        assert "motion_adapter" in refusal(answer, 400)
        assert other.client().post("/api/v3/wavespeed-ai/sdxl-lora", json={"prompt": "a fox"}).status_code == 200


class RedChecker:
    """Flags pictures that are mostly red, as the first frames of these videos are."""

    name = version = "red"

    def __init__(self) -> None:
        self.seen = 0

    def check(self, images: Any) -> list[Verdict]:
        verdicts = []
        for image in images:
            self.seen += 1
            red, green, _ = np.asarray(image, float).mean((0, 1))
            flagged = bool(red > 190 and green < 40)
            verdicts.append(Verdict(flagged, float(flagged), self.name))
        return verdicts


def test_every_frame_is_checked_and_a_flagged_one_is_black(serve: Serve) -> None:
    """The others stay, and the video counts as flagged."""
    checker = RedChecker()
    with serve() as other, other.worker(safety=SafetyGate(checker)):
        prediction = made(other.client(), output_format="webp")
        assert prediction["has_nsfw_contents"] == [True] and checker.seen == 9
        frames = frames_of(httpx.get(prediction["outputs"][0], trust_env=False).content, "webp")
    assert frames[0].max() <= 8
    assert frames[-1].mean() > 30


def until(client: httpx.Client, prediction: dict[str, Any], status: str) -> dict[str, Any]:
    """The prediction, once it stands there."""
    deadline = time.monotonic() + 60
    while (now := read(client, prediction))["status"] != status and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now["status"] == status
    return now


def test_a_video_can_be_cancelled_while_it_is_made(serve: Serve) -> None:
    """As any job; what comes after it is made."""
    with serve() as other, other.worker(FakeBackend(step_seconds=0.2), lease_seconds=1.0):
        client = other.client()
        answer = client.post(PATH, json=SMALL | {"image": start(), "num_inference_steps": 50})
        prediction = answer.json()["data"]
        until(client, prediction, "processing")
        assert client.post(f"/api/v3/predictions/{prediction['id']}/cancel").status_code == 200
        assert until(client, prediction, "failed")["error"].startswith("cancelled")
        assert made(client, num_inference_steps=1)["status"] == "completed"
