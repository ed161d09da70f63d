"""The OpenAI dialect in OpenAPI: bodies, answers and refusals.

Knows names and types; ranges and defaults of the fields are those of the model's form (``models.py``). Knows nothing of
where values come from.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field

from impasto.api.fields import Schema
from impasto.api.models import MODELS
from impasto.api.openai_form import DEFAULT_NAME, FORMATS, RENAMED
from impasto.types import OUTPUT_FORMATS


class MadeImage(BaseModel):
    """One picture."""

    b64_json: str | None = Field(None, description="The file in base64, unless only `url` was asked for.")
    url: str | None = Field(None, description="Readable without a key, unless only `b64_json` was asked for.")
    seed: int = Field(description="Makes this picture again.")


class ImagesAnswer(BaseModel):
    """Finished pictures."""

    created: int = Field(description="Unix time in seconds.")
    data: list[MadeImage]
    background: str = "opaque"
    output_format: str = Field(examples=list(OUTPUT_FORMATS))
    size: str = Field(examples=["1024x1024"])
    id: str = Field(description="The prediction, as the other routes know it.")
    loras: list[Any] = Field([], description="What became of each LoRA, as in a prediction.")


class Model(BaseModel):
    """A model's name."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models."""

    object: str = "list"
    data: list[Model]


class Fault(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """A refusal in OpenAI's form."""

    error: Fault


_MEANING: Final = {
    400: "A wrong value; `param` names it.",
    401: "No key, or an unknown one.",
    404: "No such model.",
    413: "The body is too large.",
    429: "This key is over one of its limits; see Retry-After.",
    504: "The pictures were not made in time.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the refusals of a route."""
    known: dict[int | str, str] = {status: _MEANING[status] for status in statuses}
    known["default"] = "Any other refusal."
    return {status: {"model": Refusal, "description": meaning} for status, meaning in known.items()}


def _properties() -> Schema:
    """Return the parameters that both routes take, theirs first."""
    ours = {field.name: field.schema() for field in MODELS[0].fields}
    theirs: Schema = {
        "prompt": ours["prompt"],
        "model": {
            "type": "string",
            "default": DEFAULT_NAME,
            "examples": ["sdxl", "sdxl:owner/name@0.8", "sdxl:one@0.5+two@0.7"],
            "description": "A model, and LoRAs behind a colon.",
        },
        "n": ours["num_images"],
        "size": {"type": "string", "default": "auto", "description": "WIDTHxHEIGHT in pixels, or auto."},
        "response_format": {"type": "string", "enum": list(FORMATS), "description": "Not given: both."},
        "output_format": ours["output_format"],
    }
    hidden = {"num_images", "image", "mask_image", "enable_sync_mode", "enable_base64_output", *RENAMED.values()}
    steps = {"steps": ours["num_inference_steps"], "num_inference_steps": ours["num_inference_steps"]}
    return theirs | steps | {name: schema for name, schema in ours.items() if name not in {*hidden, *theirs}}


def _body(content_type: str, required: list[str], **more: Schema) -> Schema:
    schema = {"type": "object", "required": required, "properties": _properties() | more}
    return {"required": True, "content": {content_type: {"schema": schema}}}


def _file(description: str) -> Schema:
    return {"type": "string", "format": "binary", "description": description}


GENERATION: Final = _body("application/json", ["prompt"])
EDIT: Final = _body(
    "multipart/form-data",
    ["prompt", "image"],
    image=_file("The picture to draw over; also `image[]`."),
    mask=_file("A picture whose transparent parts are painted and whose opaque parts are kept."),
)
