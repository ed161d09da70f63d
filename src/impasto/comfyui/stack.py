"""A LORA_STACK as every pack writes and reads it: a list of ``(name, model strength, CLIP strength)``.

Knows the form. Looks for no files, and imports nothing of ComfyUI.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from impasto.errors import InvalidInput


class StackedLora(NamedTuple):
    """An item of a LORA_STACK, with its fields in the order that every pack writes and reads."""

    name: str  # as ``folder_paths`` lists it in ``loras``; a server also takes its own names, URLs and hub ids
    strength_model: float
    strength_clip: float


def read_stack(value: Any) -> list[StackedLora]:
    """Return the items of a LORA_STACK, which may come from any pack; nothing connected is an empty one.

    Raises:
        InvalidInput: It is not a list of ``(name, model strength, CLIP strength)``.
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InvalidInput("lora_stack", f"is a {type(value).__name__}; connect a list of (name, strength, strength)")
    return [_stacked(item) for item in value if _counts(item)]


def _counts(item: Any) -> bool:
    """Some packs leave empty slots in: a name of None, or the word."""
    return not (isinstance(item, list | tuple) and item and item[0] in (None, "", "None"))


def _stacked(item: Any) -> StackedLora:
    match item:
        case [str(name), float() | int() as model, float() | int() as clip] if math.isfinite(model + clip):
            return StackedLora(name, float(model), float(clip))
        case _:
            raise InvalidInput("lora_stack", f"has the item {str(item)[:80]!r}; it takes (name, strength, strength)")
