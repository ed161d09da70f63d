"""The answers on the wire: prediction object, success envelope, error body.

Knows names and types, as the compatible clients decode them: lists are always lists, ``error`` is always a string,
``executionTime`` is always an integer. Knows nothing of where the values come from (``view.py``).
"""

from __future__ import annotations

from typing import Any, Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Data = TypeVar("Data")
PublicStatus = Literal["created", "processing", "completed", "failed"]


class Wire(BaseModel):
    """Anything that is sent."""

    model_config = ConfigDict(populate_by_name=True)


class Urls(Wire):
    """Where to go next."""

    get: str = Field(description="Absolute URL of the result; needs the key.")


class Steps(Wire):
    """How far a running prediction is."""

    step: int
    total: int
    sigma: float | None = Field(None, description="Noise that is left, on the scale of the model's schedule.")


class LeftOut(Wire):
    """Parts of a LoRA that were not applied."""

    count: int = 0
    first: list[Any] = Field(default=[], description="The first ten of them.")


class AppliedLora(Wire):
    """What became of a LoRA of the request."""

    path: str = Field(description="As the request named it.")
    scale: float
    resolved: str | None = Field(None, description="What the name led to, where it says more.")
    alias_of: str | None = Field(None, description="The name it stands for on this server.")
    applied: dict[str, int] = Field({}, description="Modules that were patched, by network.")
    kinds: dict[str, int] = Field({}, description="Modules by kind: LoRA, LoHa, DoRA, ….")
    ranks: list[int] | None = Field(None, description="Smallest and largest.")
    mismatched: LeftOut = Field(LeftOut(), description="Modules that the model has in another shape.")
    unmatched: LeftOut = Field(LeftOut(), description="Modules that the model does not have.")
    ignored: LeftOut = Field(LeftOut(), description="Keys that are no weights of modules.")
    embeddings: list[str] = Field([], description="Words of the prompt that stand for vectors it brought.")
    base_model: str = Field("unknown", description="What it was made for: SDXL, SD 1.5, ….")
    trigger_words: list[str] = Field([], description="Words for the prompt, from its metadata.")
    sha256: str = Field("", description="Of the file.")
    warnings: list[str] = Field([], description="Sentences about what one may not expect.")


class Prediction(Wire):
    """One submitted request and what became of it."""

    id: str = Field(pattern="^[0-9a-f]{32}$")
    model: str
    outputs: list[str] = Field(description="URLs, readable without a key, or base64; empty unless completed.")
    urls: Urls
    has_nsfw_contents: list[bool] = Field(description="One for each output.")
    status: PublicStatus
    created_at: str = Field(description="RFC 3339, UTC, milliseconds.", examples=["2026-01-02T03:04:05.678Z"])
    error: str = Field(description="Empty unless failed.")
    execution_time: int = Field(alias="executionTime", description="Milliseconds of work.")
    timings: dict[str, int] = Field(description="Milliseconds; `inference` is always there.")
    seed: int = Field(description="The seed in use, also when the request left it to us.")
    progress: Steps | None = Field(None, description="Only while processing.")
    queue_position: int | None = Field(None, description="Only while it waits, where known: 1 is next.")
    estimated_seconds: int | None = Field(None, description="Until it begins, roughly; only while it waits.")
    loras: list[AppliedLora] | None = Field(None, description="What became of each LoRA; only when completed with any.")
    reproduce: dict[str, Any] | None = Field(
        None, description="What it takes to make it again: parameters, hashes, versions; only when completed."
    )
    expired_at: str | None = Field(None, description="When its pictures were deleted; then `outputs` is empty.")
    code: int | None = Field(None, description="Why it failed (1401, 1402, 1403, 1405), or 5004: a wait ran out.")


class Envelope(Wire):
    """A success: HTTP 200 and ``code`` 200."""

    code: Literal[200] = 200
    message: Literal["success"] = "success"
    data: Prediction


class Success(Wire, Generic[Data]):
    """A success with something else in it."""

    code: Literal[200] = 200
    message: Literal["success"] = "success"
    data: Data


class ErrorBody(Wire):
    """A refusal: ``code`` is the HTTP status; ``message`` and ``error`` are the same text."""

    code: int
    message: str
    error: str


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the refusals of a route for OpenAPI; "default" keeps the framework from promising its own 422."""
    known: dict[int | str, str] = {status: _MEANING[status] for status in statuses}
    known["default"] = "Any other refusal."
    return {status: {"model": ErrorBody, "description": meaning} for status, meaning in known.items()}


_MEANING: Final = {
    400: "A wrong value; the message names the field by its JSON pointer.",
    401: "No key, or an unknown one.",
    404: "No such thing, or not yours.",
    409: "The idempotency key was used for another request.",
    413: "The body is too large.",
    403: "The key lacks the scope that this needs.",
    429: "This key is over one of its limits; see Retry-After.",
}
