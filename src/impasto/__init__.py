"""Impasto: SDXL with LoRAs, served fast.

As a library::

    import impasto

    engine = impasto.Engine.load("builtin")
    for event in engine.generate(impasto.GenerationRequest(prompt="a red apple on a blue background", seed=7)):
        if isinstance(event, impasto.ImageReady):
            event.image.save("apple.png")

Knows the public names alone. Importing this package loads no torch: ``Engine`` is looked up when first used.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from impasto.errors import ImpastoError, InvalidInput, LoraError, ModelError
from impasto.types import (
    LIMITS,
    EmbeddingRef,
    Failed,
    Finished,
    GenerationRequest,
    ImageReady,
    LoraRef,
    Preview,
    Progress,
)

if TYPE_CHECKING:
    from impasto.engine.accel import Accel
    from impasto.engine.engine import Engine

__version__ = version("impasto")
__all__ = [
    "LIMITS",
    "Accel",
    "EmbeddingRef",
    "Engine",
    "Failed",
    "Finished",
    "GenerationRequest",
    "ImageReady",
    "ImpastoError",
    "InvalidInput",
    "LoraError",
    "LoraRef",
    "ModelError",
    "Preview",
    "Progress",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load ``Engine`` or ``Accel`` (and with them torch) at their first use (PEP 562)."""
    if name == "Engine":
        from impasto.engine.engine import Engine

        return Engine
    if name == "Accel":
        from impasto.engine.accel import Accel

        return Accel
    raise AttributeError(f"module 'impasto' has no attribute {name!r}")
