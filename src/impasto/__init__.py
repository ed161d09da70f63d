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
from impasto.types import LIMITS, Failed, Finished, GenerationRequest, ImageReady, LoraRef, Progress

if TYPE_CHECKING:
    from impasto.engine.engine import Engine

__version__ = version("impasto")
__all__ = [
    "LIMITS",
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
    "Progress",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load ``Engine`` (and with it torch) at its first use (PEP 562)."""
    if name == "Engine":
        from impasto.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'impasto' has no attribute {name!r}")
