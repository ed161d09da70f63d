"""Names: which modules of the model a name in a LoRA file means.

Knows the words that trainers put before a module's name, and that a name may be dotted or flat, diffusers' or the
original's. Knows no tensors, and no model beyond the names and shapes it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from impasto.lora.original import original_names

Parameter = Literal["weight", "bias"]
UNETS = ("unet", "refiner")
FIRST, SECOND = "text_encoder", "text_encoder_2"

# Words before a module's name, flat, and the networks that each means; an empty tuple leaves it open. Words pile up
# (``lora_unet_``, ``base_model.model.unet.``, ``text_encoders.clip_l.transformer.``) and are taken off one by one.
_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_", ()), ("lycoris_", ()), ("oft_", ()), ("boft_", ()),
    ("base_model_", ()), ("_orig_mod_", ()), ("module_", ()), ("model_", ()),
    ("text_encoders_", ()), ("conditioner_", ()),
    ("unet_", UNETS), ("diffusion_model_", UNETS), ("refiner_", ("refiner",)),
    ("text_encoder_2_", (SECOND,)), ("text_encoder_1_", (FIRST,)), ("text_encoder_", (FIRST,)),
    ("clip_l_", (FIRST,)), ("clip_g_", (SECOND,)), ("embedders_0_", (FIRST,)), ("embedders_1_", (SECOND,)),
    ("te1_", (FIRST,)), ("te2_", (SECOND,)), ("te_", (FIRST, SECOND)),
)  # fmt: skip
_MOST_WORDS = 6
_WRAPPERS = tuple((word, meant) for word, meant in _WORDS if not meant)
_TEXT_LAYER = "mlp.fc1"  # of a text encoder; it reads the width of its token embeddings
_AFTER_A_TEXT_ENCODER = (("transformer_", ()), *_WRAPPERS)


class Spelling(IntEnum):
    """How a file names a module. Where it names one twice, the smaller wins."""

    DOTTED = 0  # diffusers' own name
    FLAT = 1  # diffusers' name with underscores
    ORIGINAL = 2  # the name in the original checkpoint


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter of the model: which network, its module's dotted name in it, and which parameter of the module."""

    network: str
    module: str
    parameter: Parameter = "weight"


@dataclass(frozen=True, slots=True)
class Match:
    """Modules that a name means: one, or the base's and the refiner's, which share their names."""

    targets: tuple[Target, ...]  # weights
    spelling: Spelling


class TargetNames:
    """Finds a model's parameters by any spelling of their module.

    Args:
        shapes: Shape of every weight and bias that can be patched.
    """

    def __init__(self, shapes: Mapping[Target, Sequence[int]]) -> None:
        self._shapes = {target: tuple(shape) for target, shape in shapes.items()}
        modules: dict[str, dict[str, None]] = {}  # of each network
        for target in self._shapes:
            modules.setdefault(target.network, {})[target.module] = None
        self._modules = modules
        self._spelled = {network: _spellings(tuple(names)) for network, names in modules.items()}

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that have parameters here."""
        return tuple(self._spelled)

    def shape(self, target: Target) -> tuple[int, ...] | None:
        """Return a parameter's shape; ``None`` if the model has no such parameter."""
        return self._shapes.get(target)

    @property
    def text_widths(self) -> tuple[int, ...]:
        """Width of both text encoders' token embeddings; empty if the model has not both."""
        found = [self._width(network) for network in (FIRST, SECOND)]
        return tuple(found) if all(found) else ()

    def _width(self, network: str) -> int:
        """Return what a text encoder's layers read; 0 where there is none."""
        layers = (module for module in self._modules.get(network, ()) if module.endswith(_TEXT_LAYER))
        return next((self._shapes[Target(network, module)][1] for module in layers), 0)

    def match(self, name: str) -> Match | None:
        """Return the modules that ``name`` (a key without its tensor's suffix) means; ``None`` if it is not known."""
        for networks, flat in _readings(_flatten(name)):
            found = [
                (Target(network, module), spelling)
                for network in networks or (*UNETS, FIRST, SECOND)
                for module, spelling in [self._spelled.get(network, {}).get(flat, ("", Spelling.FLAT))]
                if module
            ]
            if found:
                spelling = max(spelling for _, spelling in found)
                dotted = spelling is Spelling.FLAT and "." in name
                return Match(tuple(target for target, _ in found), Spelling.DOTTED if dotted else spelling)
        return None

    def find(self, name: str) -> Target | None:
        """Return the first module that ``name`` means, or ``None``."""
        match = self.match(name)
        return match.targets[0] if match else None


def _flatten(name: str) -> str:
    """One spelling for all: underscores for dots, and no ``processor``, which held diffusers' first adapters."""
    return name.replace(".", "_").replace("_processor_", "_")


def _readings(flat: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Take the words off the front, one after the other; each time say which networks are meant and what is left."""
    networks: tuple[str, ...] = ()
    for _ in range(_MOST_WORDS):
        yield networks, flat.removeprefix("text_model_")
        if not networks:
            words = _WORDS
        else:
            words = _AFTER_A_TEXT_ENCODER if FIRST in networks or SECOND in networks else _WRAPPERS
        word, meant = next(((word, meant) for word, meant in words if flat.startswith(word)), ("", ()))
        if not word:
            return
        flat, networks = flat.removeprefix(word), networks or meant


def _spellings(modules: Sequence[str]) -> dict[str, tuple[str, Spelling]]:
    """Map every flat spelling of a network's modules to the module."""
    spelled: dict[str, tuple[str, Spelling]] = {}
    for original, module in original_names(modules):
        spelled[original.replace(".", "_")] = module, Spelling.ORIGINAL
    for module in modules:
        flat = module.replace(".", "_").removeprefix("text_model_")
        spelled[flat] = module, Spelling.FLAT
        for part, other in _OTHER_PARTS:
            if flat.endswith(part):
                spelled.setdefault(flat.removesuffix(part) + other, (module, Spelling.FLAT))
    return spelled


# Ends of names that diffusers' first adapters wrote otherwise, in the UNet and in the text encoders.
_OTHER_PARTS = (
    ("_to_out_0", "_to_out"),
    ("_self_attn_q_proj", "_self_attn_to_q"),
    ("_self_attn_k_proj", "_self_attn_to_k"),
    ("_self_attn_v_proj", "_self_attn_to_v"),
    ("_self_attn_out_proj", "_self_attn_to_out"),
)
