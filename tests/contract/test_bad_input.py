"""Bad input: every range broken on each side, every wrong type, and bodies made to hurt.

Each refusal is 400 (413 for size) in the one error body with the field's path; afterwards the service still works.
"""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from fastapi import Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from impasto.api.body import read_body
from impasto.api.models import MODELS
from impasto.errors import PayloadTooLarge

from .conftest import MODEL, Stack, refusal, submit

LORA = {"path": "a/b", "scale": 1}
PATH = f"/api/v3/{MODEL}"
DEEP = 200_000
HUGE = 200 * 2**20  # bytes


@pytest.fixture(autouse=True)
def still_alive(http: httpx.Client) -> Iterator[None]:
    """After each test the service takes a good request."""
    yield
    submit(http)


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    # ranges of the request table, below and above
    ({"strength": 0.009}, "/strength", "must be between 0.01 and 1, got 0.009"),
    ({"strength": 1.001}, "/strength", "must be between 0.01 and 1, got 1.001"),
    ({"prompt_strength": 0}, "/prompt_strength", "must be between 0.01 and 1, got 0"),
    ({"prompt_strength": 2}, "/prompt_strength", "must be between 0.01 and 1, got 2"),
    ({"loras": [LORA] * 6}, "/loras", "takes at most 5 items, got 6"),
    ({"loras": [LORA, LORA | {"scale": -0.001}]}, "/loras/1/scale", "must be between 0 and 4, got -0.001"),
    ({"loras": [LORA | {"scale": 7}]}, "/loras/0/scale", "must be between 0 and 4, got 7"),
    ({"size": "504*1024"}, "/size", "must be between 512 and 1536, got 504"),
    ({"size": "1544*1024"}, "/size", "must be between 512 and 1536, got 1544"),
    ({"size": "1024*504"}, "/size", "must be between 512 and 1536, got 504"),
    ({"size": "1024x1544"}, "/size", "must be between 512 and 1536, got 1544"),
    ({"size": "1024*1023"}, "/size", "must be a multiple of 8, got 1023"),
    ({"num_inference_steps": 0}, "/num_inference_steps", "must be between 1 and 50, got 0"),
    ({"num_inference_steps": 51}, "/num_inference_steps", "must be between 1 and 50, got 51"),
    ({"guidance_scale": -0.001}, "/guidance_scale", "must be between 0 and 10, got -0.001"),
    ({"guidance_scale": 10.001}, "/guidance_scale", "must be between 0 and 10, got 10.001"),
    ({"num_images": 0}, "/num_images", "must be between 1 and 4, got 0"),
    ({"num_images": 5}, "/num_images", "must be between 1 and 4, got 5"),
    ({"seed": -2}, "/seed", "must be between -1 and 9999999999, got -2"),
    ({"seed": 10_000_000_000}, "/seed", "must be between -1 and 9999999999, got 10000000000"),
    ({"high_noise_frac": -0.1}, "/high_noise_frac", "must be between 0 and 1, got -0.1"),
    ({"high_noise_frac": 1.1}, "/high_noise_frac", "must be between 0 and 1, got 1.1"),
    ({"refine_steps": 0}, "/refine_steps", "must be between 1 and 50, got 0"),
    ({"refine_steps": 51}, "/refine_steps", "must be between 1 and 50, got 51"),
    ({"acceleration": "turbo"}, "/acceleration", 'must be one of exact, balanced, fast, got "turbo"'),
    ({"acceleration": 2}, "/acceleration", "must be a string, got 2"),
    ({"prompt": "x" * 20_001}, "/prompt", "has 20001 characters; at most 20000 are taken"),
    ({"num_inference_steps": 10**400}, "/num_inference_steps", "must be between 1 and 50, got 1000"),
    ({"guidance_scale": -(10**400)}, "/guidance_scale", "must be between 0 and 10, got -1000"),
    # required things
    ({"prompt": None}, "/prompt", 'property "prompt" is missing'),
    ({"prompt": ""}, "/prompt", "must not be empty"),
    ({"prompt": " \n"}, "/prompt", "must not be empty"),
    ({"loras": [{"scale": 1}]}, "/loras/0/path", 'property "path" is missing'),
    ({"loras": [{"path": "", "scale": 1}]}, "/loras/0/path", "must not be empty"),
    # types
    ({"prompt": 5}, "/prompt", "must be a string, got 5"),
    ({"prompt": ["a cat"]}, "/prompt", "must be a string, got an array"),
    ({"prompt": "a\x00b"}, "/prompt", "must not contain NUL"),
    ({"prompt": "\ud800"}, "/prompt", "is not valid Unicode"),
    ({"negative_prompt": False}, "/negative_prompt", "must be a string, got false"),
    ({"num_inference_steps": "30"}, "/num_inference_steps", 'must be an integer, got "30"'),
    ({"num_inference_steps": 30.5}, "/num_inference_steps", "must be an integer, got 30.5"),
    ({"num_inference_steps": True}, "/num_inference_steps", "must be an integer, got true"),
    ({"guidance_scale": "5"}, "/guidance_scale", 'must be a number, got "5"'),
    ({"guidance_scale": False}, "/guidance_scale", "must be a number, got false"),
    ({"guidance_scale": {}}, "/guidance_scale", "must be a number, got an object"),
    ({"seed": [1]}, "/seed", "must be an integer, got an array"),
    ({"size": 1024}, "/size", "must be a string, got 1024"),
    ({"size": "big"}, "/size", 'must look like "1024*1024"'),
    ({"size": "1024*1024*3"}, "/size", 'must look like "1024*1024"'),
    ({"size": ""}, "/size", 'must look like "1024*1024"'),
    ({"loras": "a/b"}, "/loras", "must be an array of objects {path, scale}"),
    ({"loras": LORA}, "/loras", "must be an array of objects {path, scale}"),
    ({"loras": ["a/b"]}, "/loras/0", 'must be an object {"path", "scale"}, got "a/b"'),
    ({"loras": ["a/b"]}, "/loras/0", '; write {"path": "a/b", "scale": 1}'),
    ({"loras": [LORA, None]}, "/loras/1", 'must be an object {"path", "scale"}, got null'),
    ({"loras": [{"path": 5}]}, "/loras/0/path", "must be a string, got 5"),
    ({"loras": [LORA | {"scale": "1"}]}, "/loras/0/scale", 'must be a number, got "1"'),
    ({"loras": [LORA | {"scale": True}]}, "/loras/0/scale", "must be a number, got true"),
    ({"enable_sync_mode": "true"}, "/enable_sync_mode", 'must be true or false, got "true"'),
    ({"enable_base64_output": 1}, "/enable_base64_output", "must be true or false, got 1"),
    ({"enable_safety_checker": []}, "/enable_safety_checker", "must be true or false, got an array"),
    ({"output_format": "gif"}, "/output_format", 'must be one of png, jpeg, webp, got "gif"'),
    ({"scheduler": "magic"}, "/scheduler", "must be one of euler, "),
    ({"refine": 1}, "/refine", "must be a string, got 1"),
    ({"refine": "magic"}, "/refine", "must be one of no_refiner, expert_ensemble_refiner, base_image_refiner, got"),
    # pictures: test_pictures.py has more
    ({"image": 5}, "/image", "must be a string, got 5"),
    ({"image": {"url": "x"}}, "/image", "must be a string, got an object"),
    ({"image": "http://example.com/a.png"}, "/image", "is a URL that must be https"),
    ({"mask_image": "data:image/png;base64,AA=="}, "/mask_image", "send a PNG, JPEG, WebP, GIF or BMP"),
    # of other services
    ({"mask": 5}, "/mask", "must be a string, got 5"),
    ({"lora_scale": 4.1}, "/lora_scale", "must be between 0 and 4, got 4.1"),
    ({"lora_scale": "1", "loras": [{"path": "a/b"}]}, "/lora_scale", 'must be a number, got "1"'),
    ({"apply_watermark": 1}, "/apply_watermark", "must be true or false, got 1"),
    ({"enable_metadata": "no"}, "/enable_metadata", 'must be true or false, got "no"'),
    ({"disable_safety_checker": "no"}, "/disable_safety_checker", 'must be true or false, got "no"'),
    # what this server has not
    ({"refine": "expert_ensemble_refiner"}, "/refine", "this server has no refiner: send no_refiner, or have the"),
    ({"refine": "BASE_MODEL_REFINER"}, "/refine", "asks for expert_ensemble_refiner, and this server has no refiner"),
    ({"refine": "base_image_refiner"}, "/refine", "this server has no refiner"),
]


@pytest.mark.parametrize(("body", "pointer", "problem"), BROKEN, ids=[f"{b[1]}:{b[2][:30]}" for b in BROKEN])
def test_a_wrong_value_is_refused_by_its_path(
    http: httpx.Client, body: dict[str, Any], pointer: str, problem: str
) -> None:
    """400, the JSON pointer of the field, and what would be right."""
    answer = http.post(PATH, content=json.dumps({"prompt": "a cat"} | body))
    message = refusal(answer, 400)
    assert message.startswith(f'invalid request body, Error at "{pointer}": ')
    assert problem in message
    assert len(message) < 300


def test_every_field_of_every_model_is_broken_above() -> None:
    """The list above forgets no field that has a rule (enough that it is named there once)."""
    broken = {pointer.split("/")[1] for _, pointer, _ in BROKEN}
    videos_own = {"frames", "fps", "motion"}  # broken in test_animate
    assert {field.name for model in MODELS for field in model.fields} - videos_own <= broken


@pytest.mark.parametrize("loras", [[LORA], [], ["a/b"], 5])
def test_loras_are_an_unknown_key_to_a_model_without_them(stack: Stack, http: httpx.Client, loras: object) -> None:
    """Some clients send them to every model; like any key that a model does not have, they are ignored."""
    data = submit(http, "wavespeed-ai/sdxl", loras=loras, lora_scale="x")
    assert stack.store.get(data["id"]).input["request"]["loras"] == []


@pytest.mark.parametrize("kind", ["data", "files"])
def test_a_form_is_told_to_be_json(http: httpx.Client, kind: str) -> None:
    """A common slip with HTTP libraries; the message names the remedy."""
    form = {"data": {"prompt": "a cat"}} if kind == "data" else {"files": {"prompt": b"a cat"}}
    assert "send the fields as a JSON object, not as a form" in refusal(http.post(PATH, **form), 400)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not valid JSON at line 1 column 1"),
        (b'{"prompt": "a cat",}', "not valid JSON at line 1 column"),
        (b'{"prompt":\n "a cat"', "not valid JSON at line 2 column 9"),
        (b"prompt=a+cat", "not valid JSON at line 1 column 1"),
        (b'{"prompt": "a cat"} x', "not valid JSON at line 1 column 21"),
        (b'{"prompt": "\xff"}', "not UTF-8 text at byte 12"),
        (b'{"prompt": "a cat", "guidance_scale": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a cat", "guidance_scale": Infinity}', "Infinity is not a JSON number"),
        (b'{"prompt": "a cat", "unknown": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"prompt": "a cat", "unknown": ' + b"9" * 5000 + b"}", "a number has too many digits"),
        (b'["a cat"]', "must be a JSON object"),
        (b'"a cat"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"[" * DEEP, "nested too deeply"),
        (b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too deeply"),
        (b'{"a": ' * DEEP + b"1" + b"}" * DEEP, "nested too deeply"),
    ],
    ids=lambda value: value[:24].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_a_body_that_is_no_json_object(http: httpx.Client, body: bytes, problem: str) -> None:
    """400 with the place of the fault; nothing of the body is repeated."""
    message = refusal(http.post(PATH, content=body), 400)
    assert message.startswith("invalid request body: ")
    assert problem in message


def test_a_number_too_large_for_a_float(http: httpx.Client) -> None:
    """1e999 is JSON, and becomes infinity in most languages: out of every range, and no crash where it is unknown."""
    assert '"/guidance_scale"' in refusal(http.post(PATH, content=b'{"prompt": "x", "guidance_scale": 1e999}'), 400)
    assert '"/seed"' in refusal(http.post(PATH, content=b'{"prompt": "x", "seed": 1e999}'), 400)
    assert http.post(PATH, content=b'{"prompt": "x", "unknown": 1e999}').status_code == 200


def megabytes(total: int) -> Iterator[bytes]:
    """A body that is never whole in memory on this side either."""
    for _ in range(total // 2**20):
        yield b" " * 2**20


@pytest.mark.parametrize("headers", [{"Content-Length": str(HUGE)}, {}], ids=["plain", "chunked"])
def test_two_hundred_megabytes_are_413(http: httpx.Client, headers: dict[str, str]) -> None:
    """The client that writes its whole body before it reads gets the answer, not a broken connection."""
    answer = http.post(PATH, content=megabytes(HUGE), headers=headers)
    assert "at most 33554432 bytes" in refusal(answer, 413)


def test_an_announced_size_is_enough_to_refuse(stack: Stack) -> None:
    """Nothing of the body needs to be sent: the header alone is answered."""
    with closing(http.client.HTTPConnection(stack.url.removeprefix("http://"), timeout=10)) as connection:
        connection.putrequest("POST", PATH)
        connection.putheader("Authorization", f"Bearer {stack.key}")
        connection.putheader("Content-Length", str(HUGE))
        connection.endheaders()
        assert connection.getresponse().status == 413


@pytest.mark.parametrize(("announced", "most"), [(True, 0), (False, 3000)])
def test_no_more_than_the_limit_is_read(announced: bool, most: int) -> None:
    """An announced body over the limit is not touched; an unannounced one is left at the chunk that breaks it."""
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1000
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    headers = [(b"content-length", b"1000000")] if announced else []
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(PayloadTooLarge):
        asyncio.run(read_body(request, 2500))
    assert taken == most


def test_a_body_at_the_limit_is_read() -> None:
    """Control for the above: the limit itself is allowed."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 2500, "more_body": False}

    request = Request({"type": "http", "method": "POST", "headers": [(b"content-length", b"2500")]}, receive)
    assert len(asyncio.run(read_body(request, 2500))) == 2500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([field.name for field in MODELS[0].fields if field.name != "enable_sync_mode"])
NEAR_MISSES = st.dictionaries(NAMES, JSON | st.sampled_from([1, 0.5, "512*512", "png", [{"path": "a/b"}]]), max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=JSON | NEAR_MISSES | NEAR_MISSES.map(lambda fields: fields | {"prompt": "a cat"}))
def test_any_json_is_taken_or_refused_properly(http: httpx.Client, body: Any) -> None:
    """Whatever JSON arrives: a prediction, or 400 in the error body. Never anything else."""
    answer = http.post(PATH, content=json.dumps(body))
    if answer.status_code == 200:
        assert answer.json()["data"]["status"] == "created"
    else:
        refusal(answer, 400)


def test_a_packed_body_is_refused_by_the_name_of_its_header(http: httpx.Client) -> None:
    """Not "no text": the client is told what to change."""
    packed = gzip.compress(b'{"prompt": "a fox"}')
    answer = http.post(f"/api/v3/{MODEL}", content=packed, headers={"Content-Encoding": "gzip"})
    assert "Content-Encoding: 'gzip'" in refusal(answer, 400)
