"""The official ``openai`` client, unmodified, over a real socket: only its base URL is ours."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from impasto.api.openai_form import ImageForm, ModelName, from_form
from impasto.errors import InvalidInput
from impasto.jobs.events import PREVIEW_COUNT, Thumbnail, encode_previews

from .conftest import Stack, picture

SMALL = {"prompt": "a red fox", "size": "512x512", "extra_body": {"steps": 2, "seed": 5}}


@pytest.fixture(scope="module", autouse=True)
def no_proxy() -> Iterator[None]:
    """Nothing stands between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        yield


@pytest.fixture
def worker(stack: Stack) -> Iterator[None]:
    """A worker runs."""
    with stack.worker():
        yield


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """The client as a user makes it, but for a failure that shows at once."""
    with openai.OpenAI(api_key=stack.key, base_url=f"{stack.url}/v1", max_retries=0) as made:
        yield made


def opened(data: bytes) -> Image.Image:
    """The picture, really decoded."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def png(image: Image.Image) -> bytes:
    """The picture's file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def waiting_job(stack: Stack) -> Any:
    """The next job, taken as a worker takes it."""
    for _ in range(200):
        if jobs := stack.claim():
            [job] = jobs
            return job
        time.sleep(0.02)
    raise AssertionError("no job came")


# Making pictures


def test_generate_gives_base64_and_an_address(client: openai.OpenAI, worker: None) -> None:
    """Unasked both, because old clients read the one and new ones the other; the pictures are the same."""
    answer = client.images.generate(model="sdxl", n=2, **SMALL)
    assert answer.data
    assert len(answer.data) == 2
    for made in answer.data:
        assert made.b64_json
        assert made.url
        data = base64.b64decode(made.b64_json, validate=True)
        assert (opened(data).format, opened(data).size) == ("PNG", (512, 512))
        assert httpx.get(made.url, trust_env=False).content == data
    assert abs(answer.created - time.time()) < 60
    assert (answer.size, answer.output_format, answer.background) == ("512x512", "png", "opaque")
    assert [made.model_extra["seed"] for made in answer.data if made.model_extra] == [5, 6]


@pytest.mark.parametrize(("wanted", "absent"), [("b64_json", "url"), ("url", "b64_json")])
def test_the_response_format_that_was_asked_for(client: openai.OpenAI, worker: None, wanted: Any, absent: str) -> None:
    """That and not the other."""
    [made] = client.images.generate(response_format=wanted, **SMALL).data or []
    assert getattr(made, wanted)
    assert getattr(made, absent) is None


def test_the_async_client(stack: Stack, worker: None) -> None:
    """Several at once."""

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(api_key=stack.key, base_url=f"{stack.url}/v1") as client:
            made = [client.images.generate(model="sdxl", output_format=kind, **SMALL) for kind in ("jpeg", "webp")]
            return await asyncio.gather(*made)

    kinds = [opened(base64.b64decode(answer.data[0].b64_json)).format for answer in asyncio.run(run())]
    assert kinds == ["JPEG", "WEBP"]


def test_parameters_of_the_original_that_change_nothing_here(client: openai.OpenAI, worker: None) -> None:
    """Accepted, because programs send them."""
    assert client.images.generate(
        model="sdxl-lora",
        quality="hd",
        style="vivid",
        background="auto",
        moderation="low",
        user="somebody",
        output_compression=80,
        **SMALL,
    ).data


def test_our_own_fields_travel_in_the_extra_body(client: openai.OpenAI, stack: Stack) -> None:
    """And reach the job under the names the engine knows."""
    extra = {
        "loras": [{"path": "pixel.safetensors", "scale": 0.5}],
        "negative_prompt": "blurry",
        "seed": 42,
        "num_inference_steps": 7,
        "guidance_scale": 3.5,
        "scheduler": "K_EULER",
        "acceleration": "balanced",
    }
    with in_background(lambda: client.images.generate(model="sdxl:ink@0.8", prompt="x", size="auto", extra_body=extra)):
        job = waiting_job(stack)
        stack.complete(job)
    asked = job.input["request"]
    assert [(lora["path"], lora["scale"]) for lora in asked["loras"]] == [("ink", 0.8), ("pixel.safetensors", 0.5)]
    names = ("negative_prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler", "width", "height")
    assert [asked[name] for name in names] == ["blurry", 42, 7, 3.5, "euler", 1024, 1024]
    assert asked["acceleration"] == "balanced"
    assert job.model == "wavespeed-ai/sdxl-lora"


def in_background(call: Callable[[], Any]) -> AbstractContextManager[list[Any]]:
    """Run a call beside the test; leaving the block waits for its result or error, which is in the list."""
    return _Background(call)


class _Background(AbstractContextManager[list[Any]]):
    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._said: list[Any] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._said.append(self._call())
        except openai.OpenAIError as error:
            self._said.append(error)

    def __enter__(self) -> list[Any]:
        self._thread.start()
        return self._said

    def __exit__(self, *_: object) -> None:
        self._thread.join(30)


# Editing


def test_edit_paints_what_is_transparent_in_the_mask(client: openai.OpenAI, worker: None) -> None:
    """And keeps the rest bit for bit; the result is as large as the picture."""
    start, mask = Image.new("RGB", (512, 768), (10, 200, 30)), Image.new("RGBA", (512, 768), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 64))
    answer = client.images.edit(
        model="sdxl",
        image=png(start),
        mask=png(mask),
        prompt="a red hat",
        response_format="b64_json",
        extra_body={"strength": 0.9, "steps": 3},
    )
    [made] = answer.data or []
    drawn = opened(base64.b64decode(made.b64_json or ""))
    assert drawn.size == (512, 768)
    assert drawn.getpixel((32, 32)) != (10, 200, 30)
    assert drawn.crop((64, 0, 512, 768)).getcolors() == [(448 * 768, (10, 200, 30))]


def test_edit_reads_numbers_and_loras_from_a_form(client: openai.OpenAI, stack: Stack) -> None:
    """A form has text alone, and lists in brackets."""
    extra = {"loras": [{"path": "a/b", "scale": 0.5}, {"path": "c/d", "scale": 1}], "seed": 7, "strength": 0.7}
    with in_background(
        lambda: client.images.edit(
            image=[("start.png", picture(640, 512, 3))], prompt="x", n=2, size="512x512", extra_body=extra
        )
    ) as said:
        job = waiting_job(stack)
        stack.complete(job)
    asked = job.input["request"]
    assert [(lora["path"], lora["scale"]) for lora in asked["loras"]] == [("a/b", 0.5), ("c/d", 1)]
    assert [asked[name] for name in ("num_images", "seed", "strength", "width", "height")] == [2, 7, 0.7, 512, 512]
    assert set(job.input["pictures"]) == {"image"}
    assert len(said[0].data) == 2


@pytest.mark.parametrize(
    ("files", "param", "words"),
    [
        ({"mask": picture(512, 512, 1)}, "mask", "no transparent part"),
        ({"image": b"<svg></svg>"}, "image", "an SVG drawing"),
        ({"image": [picture(512, 512, 1)] * 2}, "image", "takes one picture, got 2"),
        ({"image": b""}, "image", "Missing required parameter"),
    ],
)
def test_edit_names_the_file_at_fault(client: openai.OpenAI, files: Any, param: str, words: str) -> None:
    """By the name it was sent under."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(**({"image": picture(512, 512, 1), "prompt": "x"} | files))
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert words in refused.value.message


# Models


def test_models_are_listed_and_can_be_looked_up(client: openai.OpenAI) -> None:
    """By short name, by our ids, and with LoRAs."""
    names = [model.id for model in client.models.list()]
    assert {"sdxl", "sdxl-lora", "wavespeed-ai/sdxl-lora", "stability-ai/sdxl"} <= set(names)
    for name in (*names, "sdxl:owner/name@0.8"):
        model = client.models.retrieve(name)
        assert (model.id, model.object) == (name, "model")
    with pytest.raises(openai.NotFoundError, match="gpt-image-1"):
        client.models.retrieve("gpt-image-1")


@pytest.mark.parametrize(
    ("text", "loras"),
    [
        ("sdxl", []),
        ("sdxl:owner/name", [("owner/name", None)]),
        ("SDXL:owner/name@0.8", [("owner/name", 0.8)]),
        ("sdxl:one@.5+owner/two@1,three", [("one", 0.5), ("owner/two", 1), ("three", None)]),
        ("wavespeed-ai/sdxl-lora:owner/name/file.safetensors@main@1.25", [("owner/name/file.safetensors@main", 1.25)]),
        ("sdxl:civitai:120096@135931@0.7", [("civitai:120096@135931", 0.7)]),
        ("sdxl:civitai:120096@135931", [("civitai:120096@135931", None)]),
        ("sdxl:https://host/a.safetensors@2", [("https://host/a.safetensors", 2)]),
    ],
)
def test_loras_in_a_models_name(text: str, loras: list[Any]) -> None:
    """Whatever a LoRA may be called; a number below ten behind the last @ is its scale."""
    assert [(lora["path"], lora.get("scale")) for lora in ModelName.read(text).loras] == loras


# Refusals


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"n": 10}, "n", "between 1 and 4, got 10"),
        ({"size": "256x256"}, "size", "between 512 and 1536"),
        ({"size": "big"}, "size", "width*height"),
        ({"prompt": ""}, "prompt", "must"),
        ({"prompt": None}, "prompt", "Missing required parameter: 'prompt'"),
        ({"steps": 99}, "steps", "between 1 and 50, got 99"),
        ({"num_inference_steps": 99}, "num_inference_steps", "got 99"),
        ({"loras": [{"path": "a"}, {"path": "b", "scale": 7}]}, "loras[1].scale", "between 0 and 4"),
        ({"model": "sdxl:a@1", "loras": [{"path": "b", "scale": 7}]}, "loras[0].scale", "between 0 and 4"),
        ({"model": "sdxl:a@1+b@7"}, "model", "scale must be between 0 and 4"),
        ({"model": "sdxl:" + "+".join("abcdef")}, "model", "at most 5"),
        ({"model": "sdxl:"}, "model", "empty LoRA"),
        ({"model": "wavespeed-ai/sdxl:a"}, "model", "takes none"),
        ({"model": 7}, "model", "must be a string"),
        ({"response_format": "png"}, "response_format", "b64_json, url"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
        ({"partial_images": 9}, "partial_images", "0 to 3"),
        ({"image": "http://127.0.0.1/x.png"}, "image", "must be https"),
        ({"svg": {"model": "x"}}, "svg", "not available"),
    ],
)
def test_a_refusal_names_the_parameter_that_was_sent(http: httpx.Client, body: Any, param: str, words: str) -> None:
    """In OpenAI's form, with the client's own word for it."""
    answer = http.post("/v1/images/generations", json={"prompt": "x"} | body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["code"] in ("invalid_value", "missing_required_parameter")
    assert words in error["message"]


def test_statuses_become_the_clients_own_errors(client: openai.OpenAI, stack: Stack) -> None:
    """A wrong key, an unknown model, a full queue."""
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").images.generate(**SMALL)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(model="dall-e-3", **SMALL)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "sdxl-lora" in unknown.value.message


def test_a_full_queue(serve: Callable[..., AbstractContextManager[Stack]]) -> None:
    """429 with the time to wait, which the client obeys when it may try again."""
    with (
        serve(max_queued=1) as stack,
        openai.OpenAI(api_key=stack.key, base_url=f"{stack.url}/v1", max_retries=0) as client,
    ):
        stack.client().post("/api/v3/wavespeed-ai/sdxl", json={"prompt": "first"})
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(**SMALL)
        assert refused.value.response.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/images/generations", 405), ("POST", "/v1/chat/completions", 404), ("POST", "/v1/models", 405)],
)
def test_other_paths_answer_in_the_same_form(http: httpx.Client, method: str, path: str, status: int) -> None:
    """A client of the original asks for more than there is here."""
    answer = http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_dialects_keep_their_own_form(http: httpx.Client) -> None:
    """The errors of /v1 are its own alone."""
    assert set(http.post("/api/v3/wavespeed-ai/sdxl", json={}).json()) == {"code", "message", "error"}


def test_bodies_that_are_none(http: httpx.Client) -> None:
    """Broken JSON, a list, a form where JSON belongs and JSON where a form belongs."""
    for path, content, kind in (
        ("generations", b"{", "application/json"),
        ("generations", b"[]", "application/json"),
        ("edits", b"{}", "application/json"),
        ("edits", b"x", "multipart/form-data"),
        ("edits", b"--a\r\nx", "multipart/form-data; boundary=a"),
    ):
        answer = http.post(f"/v1/images/{path}", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400, (path, content, answer.text)
        assert answer.json()["error"]["message"]


# Events


def test_a_stream_has_previews_and_then_the_pictures(client: openai.OpenAI, stack: Stack) -> None:
    """As many previews as were asked for at most, spread over the steps; then each picture."""
    events: list[Any] = []

    def follow() -> None:
        made = client.images.generate(stream=True, partial_images=2, n=2, prompt="x", size="512x512")
        events.extend(made)

    with in_background(follow) as said:
        job = waiting_job(stack)
        for step in range(1, 31):
            show = {job.lease: encode_previews([Thumbnail(0, step, f"preview{step}")])}
            progress = {"step": step, "total": 30, PREVIEW_COUNT: step}
            stack.store.heartbeat("test-worker", {job.lease: progress}, 60.0, show)
            time.sleep(0.03)
        stack.complete(job)
    assert said == [None]
    kinds = [event.type.split(".") for event in events]
    assert kinds == [["image_generation", "partial_image"]] * 2 + [["image_generation", "completed"]] * 2
    steps = [int(event.b64_json.removeprefix("preview")) for event in events[:2]]
    assert 10 <= steps[0] < 20 <= steps[1]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    for event in events[2:]:
        assert opened(base64.b64decode(event.b64_json)).size == (512, 512)
        assert event.usage.total_tokens == 0
    assert {event.size for event in events} == {"512x512"}


def test_a_stream_of_an_edit(client: openai.OpenAI, worker: None) -> None:
    """Under its own name."""
    extra = {"steps": 2}
    made = client.images.edit(stream=True, image=picture(512, 512, 1), prompt="x", extra_body=extra)
    assert [event.type for event in made] == ["image_edit.completed"]


def test_a_stream_tells_of_a_failure(client: openai.OpenAI, stack: Stack) -> None:
    """As the client's error, with the job's own words; a wrong value is refused before the stream begins."""
    with in_background(lambda: list(client.images.generate(stream=True, prompt="z", size="512x512"))) as said:
        assert stack.store.fail(waiting_job(stack).lease, "the disk is full", "Broken")
    assert isinstance(said[0], openai.APIError)
    assert "the disk is full" in said[0].message
    with pytest.raises(openai.BadRequestError):
        client.images.generate(stream=True, n=9, prompt="z")


def test_a_client_that_leaves_its_stream_withdraws_the_job(client: openai.OpenAI, stack: Stack) -> None:
    """As with one answer."""
    events = client.images.generate(stream=True, prompt="left in the middle", size="512x512")
    events.close()
    deadline = time.monotonic() + 10
    while stack.store.queue_depth() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stack.claim() == []


# The end of a job


def test_a_failed_job_is_not_sent_again(stack: Stack) -> None:
    """The client would repeat a 500, and the same would fail again: it is told not to."""
    with openai.OpenAI(api_key=stack.key, base_url=f"{stack.url}/v1", max_retries=2) as client:
        with in_background(lambda: client.images.generate(**SMALL)) as said:
            assert stack.store.fail(waiting_job(stack).lease, "the disk is full", "Broken")
        assert (said[0].status_code, said[0].type, said[0].code) == (500, "server_error", "generation_failed")
        with in_background(lambda: client.images.generate(model="sdxl:nobody/none", prompt="y")) as said:
            assert stack.store.fail(waiting_job(stack).lease, "loras.0.path was not found", "LoraError")
        assert (said[0].status_code, said[0].param) == (400, "model")
    assert stack.claim() == []


def test_a_client_that_gives_up_withdraws_its_job(client: openai.OpenAI, stack: Stack) -> None:
    """No worker begins what nobody waits for."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).images.generate(prompt="left alone", size="512x512")
    time.sleep(0.3)
    assert stack.claim() == []


def test_a_job_that_takes_too_long_is_cancelled(serve: Callable[..., AbstractContextManager[Stack]]) -> None:
    """Its result could not be read by anybody; 504 says so."""
    with serve(openai_timeout=0.3) as stack:
        answer = stack.client().post("/v1/images/generations", json={"prompt": "slow"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        assert stack.claim() == []


# The form, without a socket


def test_lists_and_numbers_of_a_form() -> None:
    """Both ways to write LoRAs; text that is no number stays text, which its field refuses by name."""
    items = [("n", "2"), ("strength", "0.7"), ("prompt", "7"), ("seed", "many"), ("stream", "false"), ("user", "1")]
    assert from_form(items) == {"n": 2, "strength": 0.7, "prompt": "7", "seed": "many", "stream": False, "user": "1"}
    assert from_form([("loras", json.dumps([{"path": "a"}]))]) == {"loras": [{"path": "a"}]}
    assert from_form([("loras[0][path]", "a"), ("loras[0][scale]", "2")]) == {"loras": [{"path": "a", "scale": 2}]}
    with pytest.raises(InvalidInput, match="give each a scale"):
        from_form([("loras[][path]", "a"), ("loras[][path]", "b"), ("loras[][scale]", "2")])
    with pytest.raises(InvalidInput, match="JSON list"):
        from_form([("loras", "a/b")])


def test_auto_is_no_size_of_its_own() -> None:
    """The model's own size is taken."""
    assert "size" not in ImageForm.read({"prompt": "x", "size": "auto"}).fields
