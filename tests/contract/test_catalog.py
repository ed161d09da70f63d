"""What tools read before they submit: models with their forms, prices, and an account that is never billed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from PIL import Image

from impasto.api.models import MODELS
from impasto.images import encode_png

from .conftest import Stack, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]
VERSIONS = pytest.mark.parametrize("version", ["v2", "v3"])
DOT = base64.b64encode(encode_png(Image.new("RGB", (8, 8)))).decode()


def data(answer: httpx.Response) -> Any:
    """What is in the envelope of a success."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (set(body), body["code"], body["message"]) == ({"code", "message", "data"}, 200, "success")
    return body["data"]


@VERSIONS
def test_the_list_of_models_is_as_tools_read_it(stack: Stack, http: httpx.Client, version: str) -> None:
    """Names, types and numbers that clients work with, and a path that can really be posted to."""
    models = data(http.get(f"/api/{version}/models"))
    assert [model["model_id"] for model in models] == [model.id for model in MODELS]
    for position, model in enumerate(models, 1):
        assert model["name"] == model["model_id"]
        video = model["model_id"].endswith("/image-to-video")
        assert model["type"] == ("image-to-video" if video else "text-to-image")
        assert (model["base_price"], model["sort_order"]) == (0, position)
        assert model["formula"] == '{"total_price": base_price%s}' % ("" if video else " * num_images")
        (run,) = model["api_schema"]["api_schemas"]
        assert (run["type"], run["method"], run["server"]) == ("model_run", "POST", stack.url)
        assert http.post(run["server"] + run["api_path"], json={"prompt": "a cat", "image": DOT}).is_success


def test_the_form_of_sdxl_lora_is_the_documented_one(http: httpx.Client) -> None:
    """The order of the fields and the hints by which form builders choose their parts."""
    model = next(model for model in data(http.get("/api/v3/models")) if model["model_id"] == "wavespeed-ai/sdxl-lora")
    form = model["api_schema"]["api_schemas"][0]["request_schema"]
    assert form == json.loads(json.dumps(MODELS[0].schema()))
    assert form["required"] == ["prompt"]
    assert form["x-order-properties"][:12] == [
        "prompt", "image", "mask_image", "strength", "loras", "size", "num_inference_steps", "guidance_scale",
        "num_images", "seed", "enable_base64_output", "enable_safety_checker",
    ]  # fmt: skip
    assert set(form["x-order-properties"]) == set(form["properties"])
    fields = form["properties"]
    assert (fields["loras"]["type"], fields["loras"]["maxItems"]) == ("array", 5)
    assert fields["loras"]["x-ui-component"] == "loras"
    assert (fields["size"]["type"], fields["size"]["minimum"], fields["size"]["maximum"]) == ("string", 512, 1536)
    assert "enum" not in fields["size"]
    assert fields["strength"]["x-ui-component"] == "slider"
    assert "x-ui-component" not in fields["seed"]
    assert fields["apply_watermark"]["x-hidden"] is True


@VERSIONS
def test_prices_are_zero(http: httpx.Client, version: str) -> None:
    """In both forms in use, for a model in any spelling; what is not served has no price."""
    asked = {"model_id": "WaveSpeed-AI/sdxl-lora", "inputs": {"prompt": "x", "num_images": 4}}
    unit = data(http.post(f"/api/{version}/model/pricing", json=asked))
    assert unit == {"model_id": "wavespeed-ai/sdxl-lora", "unit_price": 0, "currency": "USD"}
    price = data(http.post(f"/api/{version}/model/price", json=asked))
    free = {"price": 0, "discounted_price": 0, "discount_rate": 0, "currency": "USD"}
    assert price == {"model_id": "wavespeed-ai/sdxl-lora"} | free
    refusal(http.post(f"/api/{version}/model/price", json={"model_id": "a/b"}), 404)
    assert '"/model_id"' in refusal(http.post(f"/api/{version}/model/pricing", json={"inputs": {}}), 400)
    assert '"/model_id"' in refusal(http.post(f"/api/{version}/model/pricing", json={"model_id": 5}), 400)


@VERSIONS
@pytest.mark.parametrize("path", ["balance", "account/balance", "billing/balance"])
def test_a_balance_is_a_number_and_tries_a_key(stack: Stack, http: httpx.Client, version: str, path: str) -> None:
    """Nothing is prepaid and nothing owed; a wrong key is told so, which is what tools ask this for."""
    assert data(http.get(f"/api/{version}/{path}")) == {"balance": 0, "currency": "USD"}
    refusal(stack.client("wrong").get(f"/api/{version}/{path}"), 401)


@VERSIONS
def test_there_are_no_bills(http: httpx.Client, version: str) -> None:
    """A page of none, with or without a body."""
    nothing = {"page": 1, "page_size": 20, "total": 0, "items": []}
    assert data(http.post(f"/api/{version}/billings/search")) == nothing
    body = {"page": 3, "page_size": 50, "billing_type": "deduct", "sort": "created_at DESC"}
    assert data(http.post(f"/api/{version}/billings/search", json=body)) == nothing | {"page": 3, "page_size": 50}
    assert '"/page"' in refusal(http.post(f"/api/{version}/billings/search", json={"page": "x"}), 400)


def test_usage_is_counted_truly(serve: Serve) -> None:
    """The key's own predictions, by model and day, and how many are completed."""
    with serve() as stack:
        client = stack.client()
        submit(client)
        submit(client, "stability-ai/sdxl")
        stack.work_off()
        submit(client, version="v2")
        submit(stack.client(stack.new_key()))
        today = datetime.now(UTC).date().isoformat()
        used = data(client.post("/api/v3/user/usage_stats", json={"start_time": today, "end_time": today}))
        free = {"model_type": "text-to-image", "unit_price": 0, "total_cost": 0, "last_used_date": today}
        assert used["per_model_usage"] == [
            {"model_uuid": "wavespeed-ai/sdxl-lora", "total_count": 2} | free,
            {"model_uuid": "stability-ai/sdxl", "total_count": 1} | free,
        ]
        (day,) = used["daily_usage"]
        assert (day["date"], day["count"], day["amount"]) == (today, 3, 0)
        assert [(model["model_uuid"], model["count"]) for model in day["models"]] == [
            ("wavespeed-ai/sdxl-lora", 2), ("stability-ai/sdxl", 1),
        ]  # fmt: skip
        assert used["summary"] == {"total_cost": 0, "total_requests": 3, "success_requests": 2}
        only = data(client.post("/api/v2/user/usage_stats", json={"model_uuid": "Stability-AI/sdxl"}))
        assert only["summary"]["total_requests"] == 1
        past = {"start_time": "2020-01-01T00:00:00Z", "end_time": "2020-01-31T00:00:00+02:00"}
        assert data(client.post("/api/v3/user/usage_stats", json=past))["daily_usage"] == []


@pytest.mark.parametrize("when", ["yesterday", 5, [], "2026-02-30", "0001-01-01T00:00:00+14:00"])
def test_a_time_that_is_none_is_400(http: httpx.Client, when: Any) -> None:
    """With the field and the form that is meant."""
    message = refusal(http.post("/api/v3/user/usage_stats", json={"start_time": when}), 400)
    assert '"/start_time": must be a time in ISO 8601' in message


def test_the_list_is_small_enough_to_ask_often(http: httpx.Client) -> None:
    """Tools keep it for an hour, and some ask at every start."""
    assert len(http.get("/api/v3/models").content) < 40_000
