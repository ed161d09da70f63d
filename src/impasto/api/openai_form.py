"""From OpenAI's image parameters to the fields of a served model.

Knows both sets of names, how a form sends numbers and lists, and how a model's name can carry LoRAs. Knows nothing of
jobs or answers. Ranges and defaults are those of the model's own form (``models.py``): here values only change names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pybase64

from impasto.api.fields import Flag, Integer, Loras, Number, shown
from impasto.api.models import ALIASES, MODELS, ServedModel
from impasto.api.openai_errors import ModelNotFound
from impasto.api.room import ROOM
from impasto.errors import FieldError, InvalidInput

SHORT_NAMES: Final = {"sdxl": "wavespeed-ai/sdxl-lora", "sdxl-lora": "wavespeed-ai/sdxl-lora"}
DEFAULT_NAME: Final = "sdxl"
FORMATS: Final = ("b64_json", "url")
RENAMED: Final = {"n": "num_images", "steps": "num_inference_steps", "mask": "mask_image"}  # theirs: ours
_OURS: Final = {**ALIASES, **RENAMED}
_OWN: Final = ("enable_sync_mode", "enable_base64_output")  # decided by this dialect
_REFUSED: Final = {
    "markup": "is not available: paint the mask in its place",
    "svg": "is not available: pictures are png, jpeg or webp",
    "frame_count": "is not available: there is no animation",
}
_BY_ID: Final = {model.id: model for model in MODELS if model.type != "image-to-video"}
# A number behind the last @ is a scale if no version of a site or branch of a repository would look like it.
_SCALED: Final = re.compile(r"(?P<path>.+)@(?P<scale>\d|\d*\.\d+)", re.DOTALL)
_BRACKETS: Final = re.compile(r"loras\[\d*\]\[(path|scale)\]")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model as this dialect names it: ``sdxl``, ``sdxl:owner/name@0.8``, ``sdxl:one+two@0.5``, or one of our ids."""

    model: ServedModel
    loras: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, text: str) -> ModelName:
        """Take a name apart.

        Raises:
            ModelNotFound: What stands before the colon is no model.
            InvalidInput: Nothing stands behind it.
        """
        name, colon, rest = text.strip().partition(":")
        model = _BY_ID.get(SHORT_NAMES.get(name.lower(), name.lower()))
        if model is None:
            known = ", ".join(model_names())
            raise ModelNotFound(f"The model '{text[:100]}' does not exist here; there are: {known}")
        parts = [part.strip() for part in re.split(r"[+,]", rest)] if colon else []
        if not all(parts):
            raise InvalidInput("model", "names an empty LoRA: write model:lora@scale, with + between several")
        return cls(model, tuple(_lora(part) for part in parts))


def model_names() -> list[str]:
    """Return every name, without LoRAs."""
    return [*SHORT_NAMES, *_BY_ID]


def _lora(text: str) -> dict[str, Any]:
    """Read ``owner/name`` or ``owner/name@0.8``."""
    match = _SCALED.fullmatch(text)
    return {"path": match["path"], "scale": float(match["scale"])} if match else {"path": text}


@dataclass(frozen=True, slots=True)
class ImageForm:
    """A request of this dialect in the words of the model's form.

    Attributes:
        name: The model, and LoRAs in its name.
        fields: Of the model's form, not checked yet.
        response_format: Where the pictures go; ``None`` puts them in both places.
        stream: Whether the answer is events.
        partial_images: Previews among the events.
        sent_as: Our names of fields to those that the client used.
    """

    name: ModelName
    fields: Mapping[str, Any]
    response_format: str | None
    stream: bool
    partial_images: int
    sent_as: Mapping[str, str]

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ImageForm:
        """Translate a body.

        Raises:
            ModelNotFound: No such model.
            InvalidInput: A value of this dialect alone is wrong, or asks for what is not there.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for key, problem in _REFUSED.items():
            if given.get(key):
                raise InvalidInput(key, problem)
        name = ModelName.read(_text(given, "model", DEFAULT_NAME))
        known = {field.name for field in name.model.fields} - {*_OWN}
        if "loras" not in known and (name.loras or given.get("loras")):
            raise InvalidInput(
                "model" if name.loras else "loras", f"has LoRAs, and {name.model.id} takes none: use sdxl"
            )
        sent_as = {_OURS.get(key, key): key for key in given if _OURS.get(key, key) in known}
        fields = {ours: given[theirs] for ours, theirs in sent_as.items()}
        if str(fields.get("size", "")).strip().lower() == "auto":
            del fields["size"]
        if name.loras:
            more = fields.get("loras", [])
            fields["loras"] = [*name.loras, *more] if isinstance(more, list) else more
        # The wait is that of a synchronous request, whose client may hang up and come again.
        fields["enable_sync_mode"] = True
        return cls(
            name,
            fields,
            _choice(given, "response_format", FORMATS),
            _flag(given, "stream"),
            _count(given, "partial_images", 3),
            sent_as,
        )

    def blamed(self, error: FieldError) -> InvalidInput:
        """Return the error in the client's own words: a LoRA in the model's name is the model's fault."""
        first, *rest = (error.field or "").split(".")
        if first == "loras" and self.name.loras:
            index = int(rest[0]) - len(self.name.loras) if rest else -1
            if index < 0 and (rest or "loras" not in self.sent_as):
                return InvalidInput("model", f"names a LoRA whose {(rest[1:] or ['list'])[0]} {error.problem}")
            rest = [str(index), *rest[1:]] if rest else rest
        return InvalidInput(".".join([self.sent_as.get(first, first), *rest]), error.problem)


def from_form(items: list[tuple[str, str]]) -> dict[str, Any]:
    """Turn the text parts of a multipart form into values: numbers and flags by the field's kind, LoRAs as a list.

    LoRAs come as ``loras[][path]`` and ``loras[][scale]``, as the official client writes lists, or as one JSON text.

    Raises:
        InvalidInput: A LoRA's scale cannot be told from another's, or the JSON is none.
    """
    kinds = {field.name: field for field in MODELS[0].fields}
    values: dict[str, Any] = {}
    parts: dict[str, list[str]] = {"path": [], "scale": []}
    for key, text in items:
        if bracket := _BRACKETS.fullmatch(key):
            parts[bracket[1]].append(text)
            continue
        kind = kinds.get(_OURS.get(key, key))
        values[key] = _typed(key, text, kind)
    if parts["path"] or parts["scale"]:
        values["loras"] = _paired(parts["path"], parts["scale"])
    return values


def _typed(key: str, text: str, kind: object) -> Any:
    if isinstance(kind, Loras):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidInput(key, "must be a JSON list of {path, scale}") from None
    if isinstance(kind, Integer | Number) or key == "partial_images":
        return _number(text)
    if isinstance(kind, Flag) or key == "stream":
        return {"true": True, "false": False, "1": True, "0": False}.get(text.strip().lower(), text)
    return text


def _number(text: str) -> Any:
    """Read a number; anything else stays text, which the field then refuses."""
    if re.fullmatch(r"\s*[+-]?\d{1,20}\s*", text):
        return int(text)
    return float(text) if re.fullmatch(r"\s*[+-]?\d{0,20}\.\d{1,20}\s*", text) else text


def _paired(paths: list[str], scales: list[str]) -> list[dict[str, Any]]:
    if scales and len(scales) != len(paths):
        raise InvalidInput("loras", "have scales for some only, and a form does not say for which: give each a scale")
    if not scales:
        return [{"path": path} for path in paths]
    return [{"path": path, "scale": _number(scale)} for path, scale in zip(paths, scales, strict=True)]


def start_picture(data: bytes, *, sized: bool) -> dict[str, Any]:
    """Return the fields for a picture that is to be edited; unless ``sized``, the result is as large as the picture.

    Raises:
        InvalidInput: It is no picture.
    """
    fields: dict[str, Any] = {"image": _base64(data)}
    if not sized:
        from impasto.images import natural_size, read_picture

        with ROOM.taken(data, "image"):
            width, height = natural_size(read_picture(data, "image"))
        fields["size"] = f"{width}*{height}"
    return fields


def painted_mask(data: bytes) -> str:
    """Turn a mask whose transparent parts are painted into ours, whose white parts are; as base64 of a PNG.

    Raises:
        InvalidInput: It is no picture, or no part of it is transparent.
    """
    from PIL import ImageChops

    from impasto.images import encode_png, read_picture

    with ROOM.taken(data, "mask"):
        mask = read_picture(data, "mask")
        if mask.mode != "RGBA":
            raise InvalidInput("mask", "has no transparent part: transparent is what is painted, opaque is kept")
        return _base64(encode_png(ImageChops.invert(mask.getchannel("A"))))


def _base64(data: bytes) -> str:
    return pybase64.b64encode_as_string(data)


def _text(given: Mapping[str, Any], name: str, default: str) -> str:
    value = given.get(name, default)
    if not isinstance(value, str):
        raise InvalidInput(name, f"must be a string, got {shown(value)}")
    return value or default


def _choice(given: Mapping[str, Any], name: str, words: tuple[str, ...]) -> str | None:
    value = given.get(name)
    if value is not None and value not in words:
        raise InvalidInput(name, f"must be one of {', '.join(words)}, got {shown(value)}")
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInput(name, f"must be true or false, got {shown(value)}")
    return value


def _count(given: Mapping[str, Any], name: str, most: int) -> int:
    value = given.get(name, 0)
    if type(value) is not int or not 0 <= value <= most:
        raise InvalidInput(name, f"must be a whole number from 0 to {most}, got {shown(value)}")
    return value
