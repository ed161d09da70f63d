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
from impasto.api.models import MODELS, STABILITY, WAVESPEED, Ranges
from impasto.types import ACCELERATIONS, LIMITS, OUTPUT_FORMATS, REFINE_MODES, Bounds

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
def test_the_schema_of_a_model_is_its_row_of_the_table(openapi: dict[str, Any], path: str) -> None:
    """Stated once, published everywhere: fields, order and ranges are those of ``MODELS``."""
    model = next(model for model in MODELS if path.endswith(f"/{model.id}"))
    schema = openapi["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema == json.loads(json.dumps(model.schema()))


@pytest.mark.parametrize(("vendor", "ranges"), [("wavespeed-ai", WAVESPEED), ("stability-ai", STABILITY)])
def test_ranges_in_the_schema_are_the_limits(openapi: dict[str, Any], vendor: str, ranges: Ranges) -> None:
    """What a form shows is what the engine takes."""
    fields = properties(openapi, f"/api/v3/{vendor}/sdxl-lora")

    def ends(schema: dict[str, Any]) -> tuple[float, float]:
        return schema["minimum"], schema["maximum"]

    def bounds(limit: Bounds) -> tuple[float, float]:
        return limit.low, limit.high

    for name in ("num_images", "seed", "strength", "high_noise_frac", "lora_scale"):
        assert ends(fields[name]) == bounds(getattr(LIMITS, name)), name
    for name in ("num_inference_steps", "guidance_scale"):
        assert ends(fields[name]) == bounds(getattr(ranges, name)), name
        assert fields[name]["default"] == getattr(ranges, name).default
    assert ends(fields["size"]) == bounds(ranges.side)
    assert fields["size"]["multipleOf"] == LIMITS.side_multiple
    assert ends(fields["loras"]["items"]["properties"]["scale"]) == bounds(LIMITS.lora_scale)
    assert fields["loras"]["maxItems"] == LIMITS.max_loras
    assert "loras" not in properties(openapi, f"/api/v3/{vendor}/sdxl")
    assert fields["prompt"]["maxLength"] == LIMITS.max_prompt_chars
    assert fields["output_format"]["enum"] == list(OUTPUT_FORMATS)
    assert fields["refine"]["enum"] == list(REFINE_MODES)
    assert fields["acceleration"]["enum"] == list(ACCELERATIONS)


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
        "acceleration": "exact",
        "lora_scale": 1,
        "enable_metadata": True,
        "apply_watermark": False,
        "disable_safety_checker": False,
    }


def test_the_schema_has_every_route_and_its_refusals(openapi: dict[str, Any]) -> None:
    """Paths, keys, success and error bodies; no 422, which is never sent."""
    reads = [f"/api/{v}/predictions/{{prediction_id}}{end}" for v in ("v2", "v3") for end in ("", "/result")]
    for path in PATHS:
        route = openapi["paths"][path]["post"]
        assert {"200", "400", "401", "409", "413", "429", "default"} == set(route["responses"])
        assert route["security"]
        assert [parameter["name"] for parameter in route["parameters"]] == ["Idempotency-Key", "webhook"]
    for path in reads:
        assert {"200", "401", "404", "default"} <= set(openapi["paths"][path]["get"]["responses"])
    assert "HTTPValidationError" not in openapi["components"]["schemas"]
    assert "422" not in str(openapi["paths"])
    assert set(openapi["components"]["schemas"]) >= {"Envelope", "Prediction", "ErrorBody"}
    assert "executionTime" in openapi["components"]["schemas"]["Prediction"]["properties"]


def test_both_versions_have_the_same_routes(openapi: dict[str, Any]) -> None:
    """They differ in their paths alone."""
    paths = {v: {path[7:]: set(routes) for path, routes in openapi["paths"].items() if path[:8] == f"/api/{v}/"}
             for v in ("v2", "v3")}  # fmt: skip
    assert paths["v2"] == paths["v3"] != {}


def spread_of(schema: dict[str, Any]) -> str:
    """The range of a field in words."""
    if "maximum" in schema:
        return f"{schema['minimum']:g} to {int(schema['maximum'])}"
    if "enum" in schema:
        return ", ".join(schema["enum"])
    return f"at most {schema['maxItems']}" if schema.get("maxItems") else ""


def row(field: Any, prefix: str = "", required: tuple[str, ...] = ("prompt",)) -> str:
    """One line of the request table, made from the field itself."""
    schema = field.schema()
    spread = spread_of(schema)
    default = "required" if field.name in required else json.dumps(schema.get("default", "none")).strip('"')
    return f"| `{prefix}{field.name}` | {schema['type']} | {default or 'empty'} | {spread} | {field.description} |"


def table(heading: str) -> list[str]:
    """The rows of the first table below a heading of docs/api.md."""
    below = DOCS.read_text().split(f"\n{heading}\n")[1]
    return re.findall(r"^\|.*\|$", re.split(r"\n#+ ", below)[0], re.MULTILINE)[2:]


def test_the_docs_table_is_the_form() -> None:
    """The table of fields is what the code checks: no line more or less, in the order of the form."""
    rows = [row(field) for field in MODELS[0].fields]
    at = rows.index(row(MODELS[0].fields[4])) + 1
    inner = [line for line in table("## Fields") if line.startswith("| `loras[].")]
    assert table("## Fields") == [*rows[:at], *inner, *rows[at:]]


def test_the_docs_say_where_the_models_differ() -> None:
    """For each model its defaults and ranges that are not the first one's, and the fields it does not have."""
    first = {field.name: row(field) for field in MODELS[0].fields}
    rows = []
    for model in MODELS[1:]:
        if model.type == "image-to-video":  # it has a table of its own
            continue
        has = {field.name: field.schema() for field in model.fields}
        for name, line in first.items():
            if name not in has:
                rows.append(f"| `{model.id}` | `{name}` | not there: ignored |  |")
            elif row(next(field for field in model.fields if field.name == name)) != line:
                schema = has[name]
                default, spread = json.dumps(schema.get("default", "none")).strip('"'), spread_of(schema)
                rows.append(f"| `{model.id}` | `{name}` | {default} | {spread} |")
    assert table("### Where the models differ") == rows


def test_the_docs_have_the_form_of_videos() -> None:
    """A table of its own, line for line."""
    [model] = [model for model in MODELS if model.type == "image-to-video"]
    assert table("## Image to video") == [row(field, "", model.required) for field in model.fields]


def test_the_docs_table_has_the_scale_of_a_lora() -> None:
    """The one range inside another field."""
    assert row(SCALE, "loras[].") in DOCS.read_text().splitlines()


def test_the_docs_name_every_route_and_model(openapi: dict[str, Any]) -> None:
    """Nothing served is left out of the page."""
    text = DOCS.read_text()
    for model in MODELS:
        assert f"`{model.id}`" in text
    for path in openapi["paths"]:
        general = path.replace("/api/v2/", "/api/v3/").replace("prediction_id", "id")  # the page says they are alike
        general = re.sub(r"^(/api/v3)/[a-z-]+-ai/.*", r"\1/{model}", general)
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
