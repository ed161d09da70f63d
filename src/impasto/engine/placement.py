"""Where each part of a model runs, and in which number format: ``cuda,text=cpu`` and ``bfloat16,vae=float32``.

Knows the spelling of the settings. Knows no networks.
"""

from __future__ import annotations

import logging

import torch

from impasto.engine.accel import choose_device, choose_dtype
from impasto.errors import ConfigError
from impasto.models.networks import Devices, Dtypes

log = logging.getLogger(__name__)

_QUESTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}

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
    found = {part: choose_dtype(others.get(part, first), getattr(devices, part)) for part in PARTS}
    for dtype in sorted({d for part, d in found.items() if _is_slow(d, getattr(devices, part))}, key=str):
        log.warning(
            "dtype: this processor has no products in %s, they may take a hundred times as long as in float32; "
            "dtype=float32 is faster here",
            str(dtype).removeprefix("torch."),
        )
    return Dtypes(**found)


def _is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU multiplies in this format by a reference code, as torch's oneDNN tells."""
    return device.type == "cpu" and dtype in _QUESTIONS and not _multiplies(dtype)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has products in this format; a torch without oneDNN cannot tell, and nothing is said."""
    try:
        return bool(getattr(torch.ops.mkldnn, _QUESTIONS[dtype])())
    except (AttributeError, RuntimeError):
        return True


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
