"""The kinds of request fields: how a JSON value of each kind is checked, and how it is described in JSON Schema.

Knows JSON values, ranges and the words for "wrong". Knows nothing of HTTP, of which model has which field
(``models.py``) or of what a value is used for (``submission.py``). Checking and describing sit side by side in one
class, so the published schema cannot drift from what is really accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Protocol

from impasto.api.pictures import PictureAt, to_mask_png, to_png
from impasto.errors import InvalidInput
from impasto.types import LIMITS, Bounds, LoraRef, check_prompt, parse_size

Schema = dict[str, Any]

_JSON_NAMES: Mapping[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class Field(Protocol):
    """One named value of a request; ``null`` never reaches ``read``, because it means "not given"."""

    @property
    def name(self) -> str:
        """The key in the request body."""
        ...

    @property
    def description(self) -> str:
        """One sentence for the published schema and the docs."""
        ...

    @property
    def default(self) -> Any:
        """The value used when the field is not given."""
        ...

    def read(self, value: object, path: str) -> Any:
        """Return the checked value, or raise ``InvalidInput`` for ``path``."""
        ...

    def schema(self) -> Schema:
        """Return the JSON Schema of the field."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """A string that can be stored and encoded everywhere: no NUL, no half of a surrogate pair."""

    name: str
    description: str
    default: str | None = None
    min_chars: int = 0
    max_chars: int = LIMITS.max_prompt_chars

    def read(self, value: object, path: str) -> str:
        """Return the string itself."""
        text = _text(value, path)
        check_prompt(path, text)
        return text

    def schema(self) -> Schema:
        """A string with its lengths."""
        least = {"minLength": self.min_chars} if self.min_chars else {}
        return _described(self, type="string", maxLength=self.max_chars, **least)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as an address, a data URI or naked base64; "" is "not given". A mask is read for its brightness."""

    name: str
    description: str
    default: str = ""
    mask: bool = False

    def read(self, value: object, path: str) -> bytes | PictureAt | None:
        """Return the picture, decoded once and written anew as PNG, or its address: nothing is fetched here."""
        text = _text(value, path)
        if not text.strip():
            return None
        if address := PictureAt.of(text, path, mask=self.mask):
            return address
        return to_mask_png(text, path) if self.mask else to_png(text, path)

    def schema(self) -> Schema:
        """A string without an end to its length: the whole body has one."""
        return _described(self, type="string", **{"x-ui-component": "uploader"})


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number in a range; ``30.0`` is one, ``"30"``, ``30.5`` and ``true`` are not."""

    name: str
    description: str
    bounds: Bounds
    optional: bool = False  # no default of its own: absent stays absent
    slider: bool = True

    @property
    def default(self) -> int | None:
        """The default of the range."""
        return None if self.optional else int(self.bounds.default)

    def read(self, value: object, path: str) -> int:
        """Return the number as an ``int``."""
        number = _number(value, path, "an integer")
        if isinstance(number, float) and not number.is_integer():
            raise InvalidInput(path, f"must be an integer, got {shown(value)}")
        self.bounds.check(path, number)
        return int(number)

    def schema(self) -> Schema:
        """An integer with both ends of its range."""
        slider = {"x-ui-component": "slider", "step": 1} if self.slider else {}
        return _described(self, type="integer", minimum=int(self.bounds.low), maximum=int(self.bounds.high), **slider)


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number in a range; forms move it by ``step``."""

    name: str
    description: str
    bounds: Bounds
    step: float = 0.01

    @property
    def default(self) -> float:
        """The default of the range."""
        return self.bounds.default

    def read(self, value: object, path: str) -> float:
        """Return the number as a ``float``."""
        number = _number(value, path, "a number")
        self.bounds.check(path, number)
        return float(number)

    def schema(self) -> Schema:
        """A number with both ends of its range."""
        slider = {"x-ui-component": "slider", "step": self.step}
        return _described(self, type="number", minimum=self.bounds.low, maximum=self.bounds.high, **slider)


@dataclass(frozen=True, slots=True)
class Flag:
    """``true`` or ``false``; nothing else is taken for either."""

    name: str
    description: str
    default: bool = False
    hidden: bool = False  # forms do not show it

    def read(self, value: object, path: str) -> bool:
        """Return the boolean itself."""
        if not isinstance(value, bool):
            raise InvalidInput(path, f"must be true or false, got {shown(value)}")
        return value

    def schema(self) -> Schema:
        """A boolean."""
        return _described(self, type="boolean", **({"x-hidden": True} if self.hidden else {}))


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words, compared without case; ``aliases`` maps other spellings to the word meant."""

    name: str
    description: str
    default: str
    words: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    def read(self, value: object, path: str) -> str:
        """Return the word in its own spelling."""
        text = _text(value, path)
        spelling = {alias.lower(): word for alias, word in self.aliases}
        spelling |= {word.lower(): word for word in self.words}
        if text.lower() not in spelling:
            raise InvalidInput(path, f"must be one of {', '.join(self.words)}, got {shown(text)}")
        return spelling[text.lower()]

    def schema(self) -> Schema:
        """The words that are served."""
        return _described(self, type="string", enum=list(self.words), **{"x-ui-component": "select"})


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in one string, ``"W*H"``; ``"WxH"`` is taken as well."""

    name: str
    description: str
    sides: Bounds = LIMITS.side

    @property
    def default(self) -> str:
        """The default of either side."""
        return f"{self.sides.default:g}*{self.sides.default:g}"

    def read(self, value: object, path: str) -> tuple[int, int]:
        """Return ``(width, height)`` in pixels."""
        return parse_size(_text(value, path), path, self.sides)

    def schema(self) -> Schema:
        """A string; ``minimum``, ``maximum`` and ``multipleOf`` speak of each side, as form builders read them."""
        side = {"minimum": int(self.sides.low), "maximum": int(self.sides.high), "multipleOf": LIMITS.side_multiple}
        form = {"pattern": r"^\s*\d{3,4}\s*[*xX×]\s*\d{3,4}\s*$", "x-ui-component": "size"}
        return _described(self, type="string", **form, **side)


@dataclass(frozen=True, slots=True)
class Loras:
    """The LoRAs to apply, each ``{"path", "scale"}``."""

    name: str
    description: str
    max_items: int = LIMITS.max_loras
    scale: float = LIMITS.lora_scale.default  # of items that name none
    ITEM: ClassVar[str] = 'an object {"path", "scale"}'

    @property
    def default(self) -> list[object]:
        """No LoRA."""
        return []

    def scaled(self, scale: float) -> Loras:
        """Return the field for a request whose items have this scale unless they name one."""
        return replace(self, scale=scale)

    def read(self, value: object, path: str) -> tuple[LoraRef, ...]:
        """Return the LoRAs in the order given."""
        if not isinstance(value, list):
            raise InvalidInput(path, f"must be an array of objects {{path, scale}}, got {shown(value)}")
        if len(value) > self.max_items:
            raise InvalidInput(path, f"takes at most {self.max_items} items, got {len(value)}")
        return tuple(self._item(item, f"{path}.{index}") for index, item in enumerate(value))

    def _item(self, item: object, path: str) -> LoraRef:
        if not isinstance(item, dict):
            remedy = f'; write {{"path": {shown(item)}, "scale": {self.scale:g}}}' if isinstance(item, str) else ""
            raise InvalidInput(path, f"must be {self.ITEM}, got {shown(item)}{remedy}")
        if item.get("path") is None:
            raise InvalidInput(f"{path}.path", 'property "path" is missing')
        where = _text(item["path"], f"{path}.path").strip()
        if not where:
            raise InvalidInput(f"{path}.path", "must not be empty")
        check_prompt(f"{path}.path", where)
        scale = item.get("scale")
        return LoraRef(where, self.scale if scale is None else SCALE.read(scale, f"{path}.scale"))

    def schema(self) -> Schema:
        """An array of objects with a path and a scale."""
        location = {
            "type": "string",
            "minLength": 1,
            "description": "Its name here, owner/name of the hub, a URL, or a Civitai id.",
        }
        item = {"type": "object", "required": ["path"], "properties": {"path": location, "scale": SCALE.schema()}}
        return _described(self, type="array", maxItems=self.max_items, items=item, **{"x-ui-component": "loras"})


SCALE: Final = Number("scale", "How strongly it is applied.", LIMITS.lora_scale)


def shown(value: object) -> str:
    """Return a short, printable picture of a JSON value for an error message; containers only by their kind."""
    if isinstance(value, (str, int, float, bool)):
        text = json.dumps(value[:50] if isinstance(value, str) else value)
        return text if len(text) <= 43 else f"{text[:40]}…"
    return _JSON_NAMES.get(type(value), "something else")


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput(path, f"must be a string, got {shown(value)}")
    if "\x00" in value:
        raise InvalidInput(path, "must not contain NUL characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(path, "is not valid Unicode text: it has half of a surrogate pair") from None
    return value


def _number(value: object, path: str, wanted: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInput(path, f"must be {wanted}, got {shown(value)}")
    return value


def _described(field: Field, **keywords: Any) -> Schema:
    default = {} if field.default is None else {"default": field.default}
    return {**keywords, **default, "description": field.description}
