"""LoRAs as options of a command: found by the words that the user wrote, and named by them in errors.

Knows where names of LoRAs are looked up. Knows no requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from impasto.config import Settings
from impasto.errors import FieldError
from impasto.types import LoraRef


@contextmanager
def loras_by_option(loras: Sequence[str]) -> Iterator[None]:
    """Name a LoRA in an error as the user wrote it, and not by the request's field."""
    try:
        yield
    except FieldError as error:
        match = re.match(r"loras(?:\.(\d+))?(?:\.|$)", error.field or "")
        if match is None:
            raise
        option = f"--lora {loras[int(match[1])]}" if match[1] else "--lora"
        raise type(error)(option, error.problem) from None


def name_and_scale(text: str) -> tuple[str, float]:
    """Divide ``NAME:SCALE``; without a scale it is 1."""
    name, colon, scale = text.rpartition(":")
    try:
        return (name, float(scale)) if colon and not Path(text).exists() else (text, 1.0)
    except ValueError:  # a colon of the name's own, as in an address
        return text, 1.0


def lora_named(text: str, model: str, config: Path | None) -> LoraRef:
    """Read ``NAME`` or ``NAME:SCALE``, where the name is a file's or what a request to the service would give."""
    name, number = name_and_scale(text)
    path = Path(name).expanduser()
    if not path.is_file():
        from impasto.worker.loras import LoraLibrary

        library = LoraLibrary.of(Settings.load(config, {"model": model}))
        path = library.find(name, "--lora", None).file
    return LoraRef(str(path), number)
