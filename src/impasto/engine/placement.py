"""Where each part of a model runs, and in which number format: ``cuda,text=cpu`` and ``bfloat16,vae=float32``.

Knows the spelling of the settings. Knows no networks.
"""

from __future__ import annotations

from impasto.engine.accel import choose_device, choose_dtype
from impasto.errors import ConfigError
from impasto.models.networks import Devices, Dtypes

PARTS = ("unet", "vae", "text")


def choose_devices(text: str = "auto") -> Devices:
    """Read a device for all parts, or one with exceptions.

    Raises:
        ConfigError: No such part, or no such device here.
    """
    first, others = _split(text, "device")
    return Devices(**{part: choose_device(others.get(part, first)) for part in PARTS})


def choose_dtypes(text: str, devices: Devices) -> Dtypes:
    """Read a number format for all parts, or one with exceptions; ``auto`` is what suits a part's device.

    Raises:
        ConfigError: No such part or format.
    """
    first, others = _split(text, "dtype")
    return Dtypes(**{part: choose_dtype(others.get(part, first), getattr(devices, part)) for part in PARTS})


def _split(text: str, setting: str) -> tuple[str, dict[str, str]]:
    """Divide ``first,part=other,…``; without a first value it is ``auto``."""
    first, others = "auto", {}
    for position, item in enumerate(part.strip() for part in text.split(",")):
        name, named, value = (piece.strip() for piece in item.partition("="))
        if not named and position == 0:
            first = item
        elif not named or name not in PARTS or not value or name in others:
            raise ConfigError(f"{setting}: {item[:40]!r} is not one of {', '.join(f'{p}=…' for p in PARTS)}, each once")
        else:
            others[name] = value
    return first, others
