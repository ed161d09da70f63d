"""From the words of the setting ``safety_checker`` to checkers that run.

Knows the checkers' names and how they are written. Imports each one's libraries when it is asked for, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from impasto.errors import ConfigError
from impasto.safety.checker import Combined, ImageChecker
from impasto.safety.weights import Fetch, find_weights

NONE: Final = "none"


def make_checker(
    text: str, thresholds: Mapping[Any, float] | None = None, device: str = "auto", fetch: Fetch | None = None
) -> ImageChecker | None:
    """Return the checker that ``text`` names; ``None`` for ``none``.

    Args:
        text: ``none``, or with commas between: ``builtin``; ``compvis:NAME``; ``hf:NAME``, ``hf:NAME#label+label``
            where not all but the harmless labels count. ``NAME`` is a folder or a repository of the hub.
        thresholds: By the part before the colon, where a checker's own is not wanted.
        device: Where those with a network in torch run; ``auto``: on the GPU if there is one.
        fetch: Brings files of the hub to disk, as in ``weights.find_weights``.

    Raises:
        ConfigError: No such checker, or its weights are missing or wrong.
    """
    if text.strip() == NONE:
        return None
    checkers = [_one(part.strip(), thresholds or {}, device, fetch) for part in text.split(",")]
    return checkers[0] if len(checkers) == 1 else Combined(checkers)


def _one(text: str, thresholds: Mapping[Any, float], device: str, fetch: Fetch | None) -> ImageChecker:
    kind, _, rest = text.partition(":")
    name, _, labels = rest.partition("#")
    threshold = thresholds.get(kind)
    if text == "builtin":
        from impasto.safety.builtin import BuiltinChecker

        return BuiltinChecker(threshold)
    if kind == "compvis" and name and not labels:
        from impasto.safety.compvis import CompVisChecker

        return CompVisChecker(find_weights(name, fetch), threshold, _device(device))
    if kind == "hf" and name:
        from impasto.safety.classifier import ClassifierChecker

        wanted = [label.strip() for label in labels.split("+") if label.strip()]
        return ClassifierChecker(find_weights(name, fetch), wanted, threshold, _device(device))
    raise ConfigError(f"safety_checker: {text!r} is no checker; write builtin, compvis:NAME, hf:NAME, or none alone")


def _device(text: str) -> str:
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=text).device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        raise ConfigError(f"safety_device: {text!r} cannot be used here ({error})") from error
