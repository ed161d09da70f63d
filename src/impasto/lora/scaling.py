"""How strongly a trainer meant each module's adapter: alpha tensors, or PEFT's configuration in the metadata.

Knows the rules (alpha over rank, over its root, by pattern), and which of PEFT's ways to train are no change of the
model's weights. Knows no kinds and no model.

Source: PEFT's ``LoraConfig``; rank-stabilised LoRA: Kalajdzievski 2023 (arXiv:2312.03732).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

METADATA_KEY = "lora_adapter_metadata"
_NETWORK = re.compile(r"(unet|refiner|text_encoder_2|text_encoder)\.(.+)")
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_CONFIG = 2**20  # characters
_MAX_PATTERN = 256  # characters
# A pattern comes from the file, and a regular expression can be made to run for ever: only such are taken as have no
# repeated groups, and at most two groups and two repeats.
_RISKY = re.compile(r"[)\]}][*+?{]|\{|\(\?|\\[1-9]")
_MOST = 2
_SIGNS = re.compile(r"[*+?\\\[\](){}|^$]")  # what makes a pattern an expression
_PATTERNS = ("alpha_pattern", "rank_pattern")
_MOST_PATTERNS = 2000  # every module is held against every pattern
# Ways to begin that take the adapter's first values out of the model, whose weights are then others; by their first
# letters, since some have a number of steps behind.
_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Variants of LoRA that are more than the sum of its two matrices.
_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "alora_invocation_tokens")
_COFT_EPS = 6e-5  # PEFT's own, where none is given
_LYCORIS_ARGUMENTS = "ss_network_args"  # JSON, as kohya's trainer notes what the network was made with


class BadConfigError(ValueError):
    """The metadata's configuration cannot be followed; the message says why and what to do."""

    def __init__(self, problem: str, remedy: str = "save it again without") -> None:
        super().__init__(f"{problem}; {remedy}")


@dataclass(frozen=True, slots=True)
class Scaling:
    """How strongly the adapters of a file are meant.

    Attributes:
        networks: PEFT's configuration of each network's adapter; empty where the file has none.
        by_root: Whether LyCORIS divided by the root of the rank. It takes that into the alpha that it saves, but for
            two kinds.
    """

    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_root: bool = False

    def config(self, network: str) -> Mapping[str, Any]:
        """Return one network's configuration; what stands without a network holds for all."""
        return self.networks.get(network) or self.networks.get("", {})

    def scale(self, network: str, module: str, rank: int, alpha: float | None) -> float:
        """Return what the delta is multiplied with: ``alpha / rank``; 1 where no alpha is known.

        Args:
            network: Network of the module.
            module: Its dotted name, for the patterns.
            rank: Inner dimension of the adapter's matrices.
            alpha: The file's own alpha for the module, which goes before the configuration's.
        """
        if alpha is None:
            alpha = self.alpha(network, module)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.config(network).get("use_rslora") is True else rank)

    def alpha(self, network: str, module: str) -> float | None:
        """Return the configured alpha of a module; ``None`` where no configuration tells it."""
        config = self.config(network)
        alpha = _by_pattern(config.get("alpha_pattern"), module)
        return _number(config.get("lora_alpha", config.get("alpha"))) if alpha is None else alpha

    def rank(self, network: str, module: str) -> int | None:
        """Return the configured rank of a module, if there is a configuration."""
        config = self.config(network)
        rank = _by_pattern(config.get("rank_pattern"), module) or _number(config.get("r"))
        return int(rank) if rank and 1 <= rank < math.inf else None

    def on_input(self, network: str, module: str) -> bool | None:
        """Whether PEFT's IA3 was made to scale a module's inputs; ``None`` where the configuration does not list it."""
        listed = self.config(network).get("feedforward_modules")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            return None
        return module.endswith(tuple(listed))

    def largest_turn(self, network: str) -> float | None:
        """Return the bound of PEFT's constrained OFT; ``None`` if it is not that."""
        config = self.config(network)
        return _number(config.get("eps", _COFT_EPS)) if config.get("coft") is True else None


def read_scaling(metadata: Mapping[str, str], path: Path) -> Scaling:
    """Read PEFT's configuration from a header's metadata (diffusers writes one for each network).

    PEFT itself writes it into a file beside its ``adapter_model.safetensors``.

    Raises:
        BadConfigError: It is no JSON object, or what it says makes the adapter more than a change of weights.
    """
    by_root = _divided_by_root(metadata.get(_LYCORIS_ARGUMENTS, ""))
    text = metadata.get(METADATA_KEY)
    if text is None and path.name == _PEFT_FILE and (beside := path.with_name(_PEFT_CONFIG)).is_file():
        with beside.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_CONFIG)
    if text is None:
        return Scaling(by_root=by_root)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise BadConfigError("has an adapter configuration that is no JSON object, so its strength is not known")
    networks: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        match = _NETWORK.fullmatch(key)
        network, name = (match[1], match[2]) if match else ("", key)
        if name in _PATTERNS and isinstance(value, dict) and len(value) > _MOST_PATTERNS:
            raise BadConfigError(f"has {len(value)} items in the {name} of its metadata; {_MOST_PATTERNS} are read")
        patterns = name in _PATTERNS and isinstance(value, dict)
        networks.setdefault(network, {})[name] = _Patterns(value) if patterns else value
    for config in networks.values():
        _check_followed(config)
    return Scaling(networks, by_root)


def _check_followed(config: Mapping[str, Any]) -> None:
    """Refuse what would be applied as plain LoRA and is not."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_STARTS):
        remedy = "save it with path_initial_model_for_weight_conversion"
        raise BadConfigError(f"began as {start[:20]!r}, which changed the model's own weights, too", remedy)
    if variant := next((name for name in _VARIANTS if config.get(name)), None):
        raise BadConfigError(f"was trained with PEFT's {variant}, which is not read here", "choose a plain LoRA")


def _divided_by_root(arguments: str) -> bool:
    try:
        values = json.loads(arguments[:_MAX_CONFIG]) if arguments else None
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and str(values.get("rs_lora")).lower() in ("true", "1")


def _number(value: Any) -> float | None:
    """Return a JSON number; one that is too large for a float is infinite, which the reader refuses."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _by_pattern(patterns: Any, module: str) -> float | None:
    """Return the number of the first pattern that the end of the module's name matches, as PEFT does."""
    return patterns.number(module) if isinstance(patterns, _Patterns) else None


class _Patterns:
    """PEFT's ``{pattern: number}``. Most are plain ends of names, which are looked up; the others are tried in turn."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        numbered = list(enumerate(values.items()))
        self._plain = {pattern: (place, value) for place, (pattern, value) in numbered if not _SIGNS.search(pattern)}
        self._others = [(place, pattern, value) for place, (pattern, value) in numbered if _SIGNS.search(pattern)]

    def number(self, module: str) -> float | None:
        """Return the first match's number.

        Raises:
            BadConfigError: A pattern that has to be tried is too involved, or none.
        """
        names = {module, module.removeprefix("text_model."), f"text_model.{module}"}
        ends = [".".join(parts[start:]) for name in names for parts in [name.split(".")] for start in range(len(parts))]
        found = [self._plain[end] for end in ends if end in self._plain]
        # An expression may spell a plain end too, so it counts only where it stands before those.
        first = min(found, key=lambda place: place[0], default=(len(self._others) + len(self._plain), None))
        for place, pattern, value in self._others:
            if place > first[0]:
                break
            if any(_ends_with(name, pattern) for name in names):
                return _number(value)
        return _number(first[1])


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    involved = len(re.findall(r"[*+?]", pattern)) > _MOST or pattern.count("(") > _MOST
    if len(pattern) > _MAX_PATTERN or involved or _RISKY.search(pattern):
        raise BadConfigError(f"has the pattern {pattern[:80]!r} in its metadata, which is too involved to be followed")
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error:
        raise BadConfigError(f"has the pattern {pattern[:80]!r} in its metadata, which is no pattern") from None


def _ends_with(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or _compiled(pattern).fullmatch(name) is not None
