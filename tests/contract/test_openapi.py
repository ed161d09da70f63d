"""The published schema and the docs say what is really checked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from impasto.api.fields import SCALE
from impasto.api.models import MODELS
from impasto.types import LIMITS, OUTPUT_FORMATS, REFINE_MODES, Bounds

from .conftest import MODEL, Stack, refusal, submit

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
PATHS = [f"/api/{version}/{model.id}" for version in ("v2", "v3") for model in MODELS]


@pytest.fixture(scope="module")
def openapi(stack: Stack) -> dict[str, Any]:
    """The schema, read without a key."""
    answer = httpx.get(f"{stack.url}/openapi.json", trust_env=False)
    assert answer.status_code == 200
    return answer.json()


def properties(openapi: dict[str, Any], path: str) -> dict[str, Any]:
    """The fields of one submit route."""
    schema = openapi["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    return schema["properties"]


@pytest.mark.parametrize("path", PATHS)
def test_ranges_in_the_schema_are_the_limits(openapi: dict[str, Any], path: str) -> None:
    """Stated once, published everywhere: no range in the schema differs from ``LIMITS``."""
    fields = properties(openapi, path)

    def ends(schema: dict[str, Any]) -> tuple[float, float]:
        return schema["minimum"], schema["maximum"]

    def bounds(limit: Bounds) -> tuple[float, float]:
        return limit.low, limit.high

    for name in ("num_inference_steps", "guidance_scale", "num_images", "seed", "strength", "high_noise_frac"):
        assert ends(fields[name]) == bounds(getattr(LIMITS, name)), name
    assert ends(fields["size"]) == bounds(LIMITS.side)
    assert fields["size"]["multipleOf"] == LIMITS.side_multiple
    assert ends(fields["loras"]["items"]["properties"]["scale"]) == bounds(LIMITS.lora_scale)
    assert fields["loras"]["maxItems"] == (LIMITS.max_loras if path.endswith("-lora") else 0)
    assert fields["prompt"]["maxLength"] == LIMITS.max_prompt_chars
    assert fields["output_format"]["enum"] == list(OUTPUT_FORMATS)
    assert fields["refine"]["enum"] == list(REFINE_MODES)


def test_defaults_of_the_documented_model(openapi: dict[str, Any]) -> None:
    """The defaults a client may show in its form."""
    fields = properties(openapi, f"/api/v2/{MODEL}")
    assert {name: schema["default"] for name, schema in fields.items() if "default" in schema} == {
        "image": "",
        "mask_image": "",
        "strength": 0.8,
        "loras": [],
        "size": "1024*1024",
        "num_inference_steps": 30,
        "guidance_scale": 5,
        "num_images": 1,
        "seed": -1,
        "enable_base64_output": False,
        "enable_safety_checker": True,
        "enable_sync_mode": False,
        "output_format": "png",
        "scheduler": "euler",
        "refine": "no_refiner",
        "high_noise_frac": 0.8,
    }


def test_the_schema_has_every_route_and_its_refusals(openapi: dict[str, Any]) -> None:
    """Paths, keys, success and error bodies; no 422, which is never sent."""
    reads = [f"/api/{v}/predictions/{{prediction_id}}{end}" for v in ("v2", "v3") for end in ("", "/result")]
    assert set(openapi["paths"]) == {*PATHS, *reads, "/outputs/{blob}", "/health"}
    for path in PATHS:
        route = openapi["paths"][path]["post"]
        assert {"200", "400", "401", "413", "429", "default"} == set(route["responses"])
        assert route["security"]
    for path in reads:
        assert {"200", "401", "404", "default"} == set(openapi["paths"][path]["get"]["responses"])
    assert "HTTPValidationError" not in openapi["components"]["schemas"]
    assert "422" not in str(openapi["paths"])
    assert set(openapi["components"]["schemas"]) >= {"Envelope", "Prediction", "ErrorBody"}
    assert "executionTime" in openapi["components"]["schemas"]["Prediction"]["properties"]


def row(field: Any, prefix: str = "") -> str:
    """One line of the request table, made from the field itself."""
    schema = field.schema()
    spread = ""
    if "maximum" in schema:
        spread = f"{schema['minimum']:g} to {int(schema['maximum'])}"
    elif "enum" in schema:
        spread = ", ".join(schema["enum"])
    elif schema.get("maxItems"):
        spread = f"at most {schema['maxItems']}"
    default = "required" if field.name == "prompt" else json.dumps(schema.get("default", "none")).strip('"')
    return f"| `{prefix}{field.name}` | {schema['type']} | {default or 'empty'} | {spread} | {field.description} |"


@pytest.mark.parametrize("field", MODELS[0].fields, ids=lambda field: field.name)
def test_the_docs_table_is_the_form(field: Any) -> None:
    """Each line of the request table in docs/api.md is what the code checks."""
    assert row(field) in DOCS.read_text().splitlines()


def test_the_docs_table_has_the_scale_of_a_lora() -> None:
    """The one range inside another field."""
    assert row(SCALE, "loras[].") in DOCS.read_text().splitlines()


def test_the_docs_name_every_route_and_model(openapi: dict[str, Any]) -> None:
    """Nothing served is left out of the page."""
    text = DOCS.read_text()
    for model in MODELS:
        assert f"`{model.id}`" in text
    for path in openapi["paths"]:
        general = re.sub(r"^(/api/v\d)/[a-z-]+-ai/.*", r"\1/{model}", path.replace("prediction_id", "id"))
        assert f"{general}`" in text, path


def test_the_request_and_the_refusal_in_the_docs_are_real(http: httpx.Client) -> None:
    """The example can be copied, and the error shown is what comes back."""
    text = DOCS.read_text()
    request = json.loads(text.split("--data-raw '")[1].split("'")[0])
    submit(http, **request)
    (shown,) = re.findall(r"```json\n(.*)\n```", text)
    refused = http.post(f"/api/v3/{MODEL}", json=request | {"loras": [{"path": "a/b", "scale": 7}]})
    assert refusal(refused, 400) == json.loads(shown)["message"]


def test_the_service_starts_without_the_heavy_libraries() -> None:
    """The process that answers requests has no tensor library in it: it starts in a second and survives the GPU."""
    heavy = ("torch", "diffusers", "transformers", "numpy", "PIL")
    code = f"import impasto.api.app, sys; print([name for name in {heavy!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
