"""What an engine is made of, for rooms that run its networks in a way of their own.

Knows the engine's insides. Knows nothing of what the others do with them; all of it belongs to the engine's thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from impasto.engine.admission import Admission
from impasto.engine.engine import Engine
from impasto.lora.apply import Adapters
from impasto.models.sdxl import Sdxl


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """An engine's networks, its LoRAs, and what turns a request into conditioning."""

    model: Sdxl
    adapters: Adapters
    admission: Admission


def parts_of(engine: Engine) -> Parts:
    """Return the parts of an engine, the very ones: a LoRA that is put on is on for the engine too."""
    return Parts(engine._model, engine._adapters, engine._admission)
