"""Submitting: what is taken, what is made of it, and what comes back at once."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from impasto.api.waiting import PATIENCE
from impasto.jobs.reading import JobReader
from impasto.types import GenerationRequest, LoraRef

from .conftest import MODEL, Stack, picture, read, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]

DOCUMENTED = {
    "prompt": "A pixel art scene of a rugged man riding a sleek, futuristic motorcycle",
    "image": "",
    "strength": 0.8,
    "loras": [{"path": "nerijs/pixel-art-xl", "scale": 1}],
    "size": "1024*1024",
    "num_inference_steps": 30,
    "guidance_scale": 5,
    "num_images": 1,
    "seed": -1,
    "enable_base64_output": True,
    "enable_safety_checker": True,
}


def job_request(stack: Stack, prediction: dict[str, Any]) -> GenerationRequest:
    """What the worker will be asked for."""
    return GenerationRequest.from_json(stack.store.get(prediction["id"]).input["request"])


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_the_documented_request_is_taken_on_both_versions(stack: Stack, http: httpx.Client, version: str) -> None:
    """The example of the hosted API's page, byte for byte in meaning, becomes a job and a full prediction object."""
    before = time.time()
    answer = http.post(f"/api/{version}/{MODEL}", json=DOCUMENTED)
    assert (answer.status_code, answer.json()["code"], answer.json()["message"]) == (200, 200, "success")
    assert set(answer.json()) == {"code", "message", "data"}
    data = answer.json()["data"]
    assert re.fullmatch("[0-9a-f]{32}", data["id"])
    assert data["urls"] == {"get": f"{stack.url}/api/{version}/predictions/{data['id']}/result"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", data["created_at"])
    assert before - 2 < stack.store.get(data["id"]).created_at.timestamp() < time.time() + 2
    plain = {key: data[key] for key in data if key not in ("id", "urls", "created_at", "seed")}
    assert plain == {
        "model": MODEL,
        "outputs": [],
        "has_nsfw_contents": [],
        "status": "created",
        "error": "",
        "executionTime": 0,
        "timings": {"inference": 0},
    }
    assert job_request(stack, data).loras == (LoraRef("nerijs/pixel-art-xl", 1.0),)


def test_every_value_reaches_the_job(stack: Stack, http: httpx.Client) -> None:
    """What was asked for is what the worker is given, and the row knows how much work it is."""
    data = submit(
        http,
        prompt="a cat",
        negative_prompt="",
        size="768x512",
        num_inference_steps=15,
        guidance_scale=7.5,
        num_images=2,
        seed=9_999_999_999,
        loras=[{"path": "a/b", "scale": 0.5, "unknown": ["x" * 1000]}, {"path": " c/d/e.safetensors "}],
        output_format="webp",
        enable_base64_output=True,
        enable_safety_checker=False,
        enable_metadata=False,
    )
    assert job_request(stack, data) == GenerationRequest(
        prompt="a cat",
        negative_prompt="",
        width=768,
        height=512,
        num_inference_steps=15,
        guidance_scale=7.5,
        num_images=2,
        seed=9_999_999_999,
        loras=(LoraRef("a/b", 0.5), LoraRef("c/d/e.safetensors", 1.0)),
    )
    job = stack.store.get(data["id"])
    assert job.input["output"] == {
        "format": "webp",
        "base64": True,
        "safety_checker": False,
        "metadata": False,
    }
    assert (job.seed, job.model, data["seed"]) == (9_999_999_999, MODEL, 9_999_999_999)
    assert job.input["as_sent"]["size"] == "768x512"
    assert job.input["as_sent"]["loras"][0] == {"path": "a/b", "scale": 0.5}
    assert job.lora_key == ("a/b@0.5", "c/d/e.safetensors@1")


def test_nothing_but_a_prompt_means_the_documented_defaults(stack: Stack, http: httpx.Client) -> None:
    """Left-out fields get the defaults of the table; URLs, not base64, are what every client expects."""
    data = http.post(f"/api/v2/{MODEL}", json={"prompt": "a cat"}).json()["data"]
    request = job_request(stack, data)
    assert request == GenerationRequest(prompt="a cat", seed=request.seed)
    assert (request.width, request.num_inference_steps, request.guidance_scale) == (1024, 30, 5)
    assert request.negative_prompt is None
    assert stack.store.get(data["id"]).input["output"] == {
        "format": "png",
        "base64": False,
        "safety_checker": True,
        "metadata": True,
    }


def test_each_model_has_its_own_defaults(stack: Stack, http: httpx.Client) -> None:
    """Two ids share the form but not the steps and guidance used when none are named."""
    requests = [job_request(stack, submit(http, model)) for model in (MODEL, "stability-ai/sdxl-lora")]
    assert [(request.num_inference_steps, request.guidance_scale) for request in requests] == [(30, 5), (28, 3.5)]


def test_each_model_has_its_own_ranges(stack: Stack, http: httpx.Client) -> None:
    """The other vendor's ids take small sides and strong guidance, and no guidance below 1."""
    wide = {"size": "256*264", "guidance_scale": 20}
    for model in ("stability-ai/sdxl-lora", "stability-ai/sdxl"):
        request = job_request(stack, submit(http, model, **wide))
        assert (request.width, request.height, request.guidance_scale) == (256, 264, 20.0)
        for body in ({"size": "248*256"}, {"size": "1024*1544"}, {"guidance_scale": 0.9}, {"guidance_scale": 20.1}):
            refusal(http.post(f"/api/v3/{model}", json={"prompt": "a cat"} | body), 400)
    for field, value in wide.items():
        refusal(http.post(f"/api/v3/{MODEL}", json={"prompt": "a cat", field: value}), 400)


@pytest.mark.parametrize("spelling", ["WaveSpeed-AI/SDXL-LoRA", "wavespeed-ai/sdxl-lora/", "Stability-AI/sdxl//"])
def test_a_models_id_is_known_in_any_case(http: httpx.Client, spelling: str) -> None:
    """Case and slashes at its end do not matter; the prediction names the model as we do."""
    assert submit(http, spelling)["model"] == spelling.strip("/").lower()


def test_lora_scale_is_for_those_that_name_none(stack: Stack, http: httpx.Client) -> None:
    """Another service's one scale for all; a LoRA's own wins."""
    loras = [{"path": "a/b"}, {"path": "c/d", "scale": 2}, {"path": "e/f", "scale": None}]
    taken = job_request(stack, submit(http, loras=loras, lora_scale=0.6)).loras
    assert [lora.scale for lora in taken] == [0.6, 2.0, 0.6]


def test_a_mask_may_be_called_mask(stack: Stack, http: httpx.Client) -> None:
    """Another service's name for it, which an empty mask_image does not take away."""
    png = base64.b64encode(picture(8, 8, 1)).decode()
    data = submit(http, image=png, mask=png, mask_image="")
    assert set(stack.store.get(data["id"]).input["pictures"]) == {"image", "mask_image"}


def test_fields_of_other_services_are_taken(stack: Stack, http: httpx.Client) -> None:
    """A watermark is never put in; the checker can be switched off by either name."""
    data = submit(http, apply_watermark=True, disable_safety_checker=True)
    assert stack.store.get(data["id"]).input["output"]["safety_checker"] is False


def test_null_is_not_given_and_unknown_keys_are_ignored(stack: Stack, http: httpx.Client) -> None:
    """Real clients send nulls, empty image strings and keys of other models; none of it changes the job."""
    sent = dict.fromkeys(DOCUMENTED) | {"prompt": "a cat", "image": "", "mask_image": ""}
    unknown = {"max_images": 1, "images": [], "resolution": {"a": [1]}}
    data = http.post(f"/api/v3/{MODEL}", json=sent | unknown).json()["data"]
    request = job_request(stack, data)
    assert request == GenerationRequest(prompt="a cat", seed=request.seed)
    assert stack.store.get(data["id"]).input["as_sent"] == {"prompt": "a cat", "image": "", "mask_image": ""}


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("num_inference_steps", 30.0, 30),
        ("num_inference_steps", 1, 1),
        ("num_inference_steps", 50, 50),
        ("guidance_scale", 0, 0.0),
        ("guidance_scale", 10, 10.0),
        ("num_images", 4, 4),
        ("seed", 0, 0),
        ("seed", 9_999_999_999, 9_999_999_999),
    ],
)
def test_the_ends_of_every_range_are_taken(
    stack: Stack, http: httpx.Client, field: str, value: float, meant: float
) -> None:
    """Ranges are inclusive, and a whole number written as 30.0 is a whole number."""
    taken = getattr(job_request(stack, submit(http, **{field: value})), field)
    assert (taken, type(taken)) == (meant, type(meant))


@pytest.mark.parametrize(
    "body",
    [
        {"strength": 0.01},
        {"strength": 1},
        {"prompt_strength": 0.5},
        {"loras": [{"path": "a/b", "scale": 0}, {"path": "a/b", "scale": 4}] * 2},
        {"size": "512*1536"},
        {"size": "1536x512"},
        {"scheduler": "K_EULER"},
        {"scheduler": "Euler"},
        {"scheduler": "DPMSolverMultistep"},
        {"scheduler": "KarrasDPM"},
        {"refine": "no_refiner", "high_noise_frac": 0.8, "refine_steps": 1},
        {"acceleration": "exact"},
        {"acceleration": "FAST"},
        {"output_format": "jpg"},
    ],
)
def test_other_accepted_values(http: httpx.Client, body: dict[str, Any]) -> None:
    """Controls for the refusals: the nearest values that are right."""
    submit(http, **body)


def test_the_acceleration_reaches_the_job(stack: Stack, http: httpx.Client) -> None:
    """What is asked for, or exact; the three values that it stands for are left to it."""
    asked = [job_request(stack, submit(http, **body)) for body in ({}, {"acceleration": "balanced"})]
    assert [request.acceleration for request in asked] == ["exact", "balanced"]
    left = {(request.reuse_features, request.guidance_start, request.guidance_end) for request in asked}
    assert left == {(None, None, None)}


def test_a_drawn_seed_is_told_and_kept(stack: Stack, http: httpx.Client) -> None:
    """-1 draws a seed once, at submit: the answer, the row and the request agree, and two draws differ."""
    drawn = [submit(http, seed=-1) for _ in range(3)]
    assert len({data["seed"] for data in drawn}) == 3
    for data in drawn:
        assert data["seed"] == stack.store.get(data["id"]).seed == job_request(stack, data).seed >= 0


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_json_is_json_whatever_it_is_called(stack: Stack, http: httpx.Client, content_type: str | None) -> None:
    """A wrong or missing content type does not matter when the body is right."""
    headers = {"Content-Type": content_type} if content_type else {}
    assert http.post(f"/api/v3/{MODEL}", content=b'\xef\xbb\xbf{"prompt": "a cat"}', headers=headers).status_code == 200


def test_a_full_queue_is_429_for_this_key_alone(serve: Serve) -> None:
    """The limit says when to come back, takes nothing from other keys, and ends when a job ends."""
    with serve(max_queued=2) as stack:
        client = stack.client()
        submit(client)
        submit(client)
        answer = client.post(f"/api/v3/{MODEL}", json={"prompt": "a cat"})
        refusal(answer, 429)
        assert int(answer.headers["retry-after"]) > 0
        submit(stack.client(stack.new_key()))
        stack.work_off()
        submit(client)


@pytest.mark.parametrize(
    ("setting", "host", "base"),
    [
        (None, "pictures.example:8443", "http://pictures.example:8443"),
        (None, "[::1]:80", "http://[::1]:80"),
        ("https://pictures.example/impasto/", "other.example", "https://pictures.example/impasto"),
    ],
)
def test_urls_are_absolute_on_the_host_that_was_called(serve: Serve, setting: str | None, host: str, base: str) -> None:
    """Old clients follow urls.get as it stands; behind a proxy the operator's setting decides."""
    with serve(public_url=setting) as stack:
        data = submit(stack.client(Host=host))
        assert data["urls"]["get"] == f"{base}/api/v3/predictions/{data['id']}/result"


def test_a_host_that_is_none_is_not_repeated(stack: Stack) -> None:
    """A made-up Host header does not get into URLs."""
    assert submit(stack.client(Host="a/b?c"))["urls"]["get"].startswith(stack.url)


def test_sync_mode_answers_with_the_finished_object(serve: Serve) -> None:
    """One request, one answer: completed, with outputs. Other requests are served meanwhile."""
    with serve() as stack:
        client, answers = stack.client(), []
        thread = threading.Thread(target=lambda: answers.append(submit(client, enable_sync_mode=True)))
        thread.start()
        job = wait_for_job(stack)
        assert stack.client().get("/health").status_code == 200
        assert not answers
        stack.complete(job)
        thread.join(10)
        assert [(data["status"], len(data["outputs"])) for data in answers] == [("completed", 1)]


def test_sync_mode_tells_of_a_failure(serve: Serve) -> None:
    """A failed job is an answer too, at once, with its error."""
    with serve() as stack:
        client, answers = stack.client(), []
        thread = threading.Thread(target=lambda: answers.append(submit(client, enable_sync_mode=True)))
        thread.start()
        stack.store.fail(wait_for_job(stack).lease, "no key fits", "LoraError")
        thread.join(10)
        assert [(d["status"], d["error"], d["code"]) for d in answers] == [("failed", "no key fits", 1401)]


def test_sync_mode_at_its_limit_says_5004(serve: Serve) -> None:
    """The wait ends with HTTP 200 and the documented form; the job goes on and can be read later."""
    with serve(sync_timeout=0.3) as stack:
        client = stack.client()
        data = submit(client, enable_sync_mode=True)
        assert (data["status"], data["code"], data["outputs"]) == ("processing", 5004, [])
        assert data["error"] == (
            "Sync mode timed out after 0.3 seconds. The prediction is still processing asynchronously."
        )
        stack.work_off()
        assert read(client, data)["status"] == "completed"


def test_a_dropped_sync_request_is_looked_after_no_more(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a client hangs up nobody looks at its row any more; test_sync.py has what becomes of its job."""
    looks: list[float] = []
    look = JobReader.read
    monkeypatch.setattr(JobReader, "read", lambda *args: [looks.append(time.monotonic()), look(*args)][1])
    with serve() as stack:
        with pytest.raises(httpx.ReadTimeout):
            stack.client().post(f"/api/v3/{MODEL}", json={"prompt": "a cat", "enable_sync_mode": True}, timeout=0.8)
        assert len(looks) >= 2
        time.sleep(2 * PATIENCE)
        assert time.monotonic() - looks[-1] > PATIENCE


def wait_for_job(stack: Stack) -> Any:
    """The one job that a request in the background has made, claimed."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        for job in stack.claim():
            return job
        time.sleep(0.01)
    pytest.fail("no job came: " + json.dumps(stack.url))
