"""LoRA files: bytes on disk to patches by parameter; what is not understood is reported or an error, never lost.

Knows the order of things: gate, names, tensors, kinds, verdict. What each of them means is in ``gate``, ``tensors``,
``keys``, ``kinds``, ``scaling`` and ``bases``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from impasto.errors import LoraError
from impasto.lora import bases
from impasto.lora.base_model import base_model
from impasto.lora.bundles import read_bundles
from impasto.lora.checks import MalformedError, WrongSizeError
from impasto.lora.contents import LoraContents, Mismatch
from impasto.lora.courtesy import give_way
from impasto.lora.gate import Header, check_header
from impasto.lora.keys import UNETS, Match, Spelling, Target, TargetNames
from impasto.lora.kinds import Adapter, read_patches
from impasto.lora.notes import trigger_words
from impasto.lora.patch import Patch
from impasto.lora.scaling import BadConfigError, Scaling, read_scaling
from impasto.lora.source import Source, open_tensors
from impasto.lora.tensors import Keys, sort_keys

MAX_SHOWN = 100  # characters of a name repeated in an error
_NO_WEIGHTS = {"alpha", "scaled_oft", "reshape_weight"}  # parts that do nothing alone
_PEFT_PART = ".lora_A"
_CHOOSE = "choose a LoRA made for SDXL"

Modules = dict[str, tuple[Match, dict[str, str]]]


@dataclass(slots=True)
class _Found:
    """What the file turned out to hold so far."""

    patches: dict[Target, Patch] = field(default_factory=dict)
    names: dict[Target, tuple[Spelling, str]] = field(default_factory=dict)  # of the module that each patch is from
    twice: list[str] = field(default_factory=list)  # modules that fitted, of which another spelling was taken
    unmatched: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    unscaled: int = 0  # modules in PEFT's names of which nothing tells the alpha
    left_to: Counter[str] = field(default_factory=Counter)  # network -> its modules of names that fit the other's only

    def take(self, name: str, spelling: Spelling, place: Target, patch: Patch) -> None:
        """Take a patch, unless the same parameter has one under a better spelling: never both."""
        other = self.names.get(place)
        if other is not None and other[0] <= spelling:
            self.twice.append(name)
            return
        if other is not None:
            self.twice.append(other[1])
        self.names[place] = spelling, name
        self.patches[place] = patch

    def matched(self) -> set[str]:
        """Return the modules that something was taken from."""
        return {name for place, (_, name) in self.names.items() if place in self.patches}


def read_lora(path: Path, model: TargetNames, field: str = "loras") -> LoraContents:
    """Read a LoRA file for a model.

    Args:
        path: An existing ``.safetensors`` file.
        model: The model's parameters.
        field: Path of the request field that named the file, for the error.

    Raises:
        LoraError: The file is no LoRA, is broken, fits nothing of the model, or was mostly made for another base: a
            base that is told as another one is refused where fewer than half of the file's modules fit, or none of
            those beside the text encoders.
    """
    header = check_header(path, field)
    keys = sort_keys(header.tensors)
    found = _Found(ignored=list(keys.beside))
    if keys.twice:
        name = keys.twice[0][:MAX_SHOWN]
        raise LoraError(field, f"names {name!r} in two spellings, so which counts is not known; save one of them")
    modules = _matched(keys, model, found)
    _sort_strange(keys, header, found)
    try:
        scaling = read_scaling(header.metadata, path)
        with (
            path.open("rb") as raw,
            open_tensors(path, header) as file,
            ThreadPoolExecutor(1, thread_name_prefix="hash") as hashing,  # beside the reading: neither needs the other
        ):
            hashed = hashing.submit(hashlib.file_digest, raw, "sha256")
            shared = {key: file.get_tensor(key).clone() for keys_of in keys.shared.values() for key in keys_of.values()}
            bundles = read_bundles(keys.beside, header.tensors, file.get_tensor, model.text_widths)
            for name, (match, parts) in modules.items():
                give_way()
                found.unscaled += _is_unscaled(match, parts, scaling)
                _read_module(name, match, _tensors(file, parts, shared), model, scaling, found, field)
            digest = hashed.result().hexdigest()
    except (SafetensorError, OSError) as error:
        raise LoraError(field, f"cannot be read ({type(error).__name__}); fetch it again") from None
    except BadConfigError as error:
        raise LoraError(field, str(error)) from None
    _leave_refiner(found)
    matched = found.matched()
    used = {key for bundle in bundles if not bundle.problem for key in bundle.keys}
    found.ignored[:] = [key for key in found.ignored if key not in used]
    found.ignored.extend(name for name in dict.fromkeys(found.twice) if name not in matched)
    return LoraContents(
        patches=found.patches,
        unmatched=tuple(found.unmatched),
        mismatched=tuple(found.mismatched),
        ignored=tuple(found.ignored),
        bundles=bundles,
        unscaled=found.unscaled,
        base_model=_verdict(keys, header, found, model, field),
        trigger_words=trigger_words(header.metadata),
        metadata=header.metadata,
        sha256=digest,
    )


def _matched(keys: Keys, model: TargetNames, found: _Found) -> Modules:
    """Return the modules that the model has."""
    modules: Modules = {}
    for name, parts in keys.modules.items():
        give_way()
        if parts.keys() <= _NO_WEIGHTS:
            found.ignored.extend(parts.values())
        elif match := model.match(name):
            modules[name] = match, parts | _shared(keys, name, parts)
        else:
            found.unmatched.append(name)
    return modules


def _shared(keys: Keys, name: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Return what a module of a VeRA shares with those under the same words."""
    if not keys.shared or not parts.keys() & {"vera_b", "vera_d"}:
        return {}
    return {
        part: key
        for part, places in keys.shared.items()
        for prefix, key in sorted(places.items(), key=lambda place: len(place[0]))
        if name.startswith(prefix)
    }


def _sort_strange(keys: Keys, header: Header, found: _Found) -> None:
    """Single numbers are notes of a tool; whatever else is not understood counts as unmatched."""
    for key in keys.strange:
        shape = header.tensors[key].shape
        (found.ignored if shape in ((), (1,)) else found.unmatched).append(key)


def _is_unscaled(match: Match, parts: Mapping[str, str], scaling: Scaling) -> bool:
    """Whether a module is one of PEFT's, which keeps its alpha elsewhere, and elsewhere there is none."""
    from_peft = _PEFT_PART in parts.get("down", "") and "alpha" not in parts
    return from_peft and all(scaling.alpha(target.network, target.module) is None for target in match.targets)


def _tensors(file: Source, parts: dict[str, str], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Cloned, because a tensor is a view of the file's pages, and the file may be overwritten while we keep it.
    return {part: shared[key] if key in shared else file.get_tensor(key).clone() for part, key in parts.items()}


def _read_module(
    name: str, match: Match, parts: dict[str, Tensor], model: TargetNames, scaling: Scaling, found: _Found, field: str
) -> None:
    """Read one module's adapter, for each module of the model that it may mean."""
    mismatches: list[Mismatch] = []
    missing: list[str] = []
    fitted: list[str] = []
    for target in match.targets:
        try:
            patches = _patches(name, target, parts, model, scaling, field)
        except WrongSizeError as error:
            mismatches.append(Mismatch(name, error.shape, model.shape(target) or ()))
            continue
        places = [(patch, place, model.shape(place)) for patch, place in patches]
        misfits = [
            Mismatch(name, patch.shape, shape) for patch, _, shape in places if shape and not _fits(patch, shape)
        ]
        mismatches += misfits
        missing += [f"{name}.{place.parameter}" for _, place, shape in places if shape is None]
        if misfits and len(match.targets) > 1:
            continue  # a bias of the same length goes with its weight
        for patch, place, shape in places:
            if shape is not None and _fits(patch, shape):
                found.take(name, match.spelling, place, patch)
                fitted.append(place.network)
    if fitted:
        found.left_to.update(target.network for target in match.targets if target.network not in fitted)
    # A name that the base and the refiner share fits one of them: that is a match.
    if len(match.targets) == 1 or not fitted:
        found.mismatched.extend(mismatches[:1] if len(match.targets) > 1 else mismatches)
        found.unmatched.extend(dict.fromkeys(missing))


def _fits(patch: Patch, shape: tuple[int, ...]) -> bool:
    return patch.fits(torch.Size(shape))


def _patches(
    name: str, target: Target, parts: dict[str, Tensor], model: TargetNames, scaling: Scaling, field: str
) -> Iterable[tuple[Patch, Target]]:
    config = scaling.config(target.network)
    from_peft = bool(config) or any(word in name for word in ("base_model.", "base_layer."))
    adapter = Adapter(
        parts=parts,
        shape=model.shape(target) or (),
        scale=partial(scaling.scale, target.network, target.module),
        peft_rank=partial(scaling.rank, target.network, target.module),
        peft_kind=str(config.get("peft_type", "LORA")).rpartition(".")[2].upper() if from_peft else None,
        neumann_terms=_neumann_terms(config),
        largest_turn=scaling.largest_turn(target.network),
        on_input=scaling.on_input(target.network, target.module),
        has_bias=model.shape(Target(target.network, target.module, "bias")) is not None,
        by_root=scaling.by_root,
    )
    try:
        patches = read_patches(adapter)
    except MalformedError as error:
        raise LoraError(
            field, f"is broken in module {name[:MAX_SHOWN]!r}: {error}; fetch it again or ask its author"
        ) from None
    return [(patch, Target(target.network, target.module, parameter)) for parameter, patch in patches.items()]


def _neumann_terms(config: Any) -> int | None:
    if config.get("use_cayley_neumann") is False:
        return None
    terms = config.get("num_cayley_neumann_terms")
    return terms if isinstance(terms, int) and 0 < terms <= 100 else 5


def _leave_refiner(found: _Found) -> None:
    """Leave the refiner alone, or the base, where a few of equal width fit it: they do not make the file its own.

    Such are biases, and rotations of an output layer's few outputs. What only one of the networks has a name for, or
    fits one alone, tells whose the file is.
    """
    of = {network: [target for target in found.patches if target.network == network] for network in UNETS}
    names = {network: {found.names[target][1] for target in of[network]} for network in UNETS}
    for network, other in (UNETS, UNETS[::-1]):
        few = names[network] < names[other] and len(names[network]) < found.left_to[network]
        if of[other] and (few or all(target.parameter == "bias" for target in of[network])):
            for target in of[network]:
                del found.patches[target]
            return


def _verdict(keys: Keys, header: Header, found: _Found, model: TargetNames, field: str) -> str:
    """Return the base model that the file was made for; the modules beside the text encoders alone decide.

    The text encoders cannot: SD 1.5, SDXL, SD 3 and Flux share the first, SDXL and SD 3 the second.

    Raises:
        LoraError: It is another one's, or no LoRA at all.
    """
    shapes = {key: info.shape for key, info in header.tensors.items()}
    base = base_model(header)
    named = [name for name, parts in keys.modules.items() if not parts.keys() <= _NO_WEIGHTS]
    if not found.patches:
        raise LoraError(field, _nothing_fits(base, named, keys, shapes, found, model))
    fitted = {name for place, (_, name) in found.names.items() if place in found.patches and place.network in UNETS}
    left = [*found.unmatched, *(mismatch.module for mismatch in found.mismatched)]
    missed = [name for name in left if not bases.of_text(name)]
    if missed and (_text_alone(base, fitted, missed, found) or (bases.is_foreign(base) and len(fitted) < len(missed))):
        raise LoraError(field, _mostly_left(base, fitted, missed, found, model))
    if not fitted or base in (*bases.OURS, *bases.RELATIVES) or len(fitted) < len(missed):
        return base
    return _base_by_fit(found)


def _text_alone(base: str, fitted: set[str], missed: list[str], found: _Found) -> bool:
    """Whether the file has a UNet's part of which nothing fits; a few strays beside text encoders are none."""
    if fitted:
        return False
    strays = not bases.is_foreign(base) and 2 * len(missed) < len(found.matched())
    return not strays or any(not bases.of_text(mismatch.module) for mismatch in found.mismatched)


def _base_by_fit(found: _Found) -> str:
    """What fits the model's UNet is for the model, whatever the metadata say."""
    networks = {target.network for target in found.patches}
    return bases.REFINER if "refiner" in networks and "unet" not in networks else bases.SDXL


def _mostly_left(base: str, fitted: set[str], missed: list[str], found: _Found, model: TargetNames) -> str:
    left = len(found.unmatched) + len(found.mismatched)
    unet = f"{len(missed)} of the {len(fitted) + len(missed)} beside the text encoders"
    total = len(found.matched()) + left
    return f"{_whose(base, model)}, and {left} of its {total} modules ({unet}) do not fit this model; {_CHOOSE}"


def _whose(base: str, model: TargetNames) -> str:
    """Say which model a file that does not fit is for."""
    if base == bases.UNKNOWN:
        return "is for another base model"
    if base == bases.REFINER and "refiner" not in model.networks:
        return "is for the SDXL refiner, which is not loaded here"
    return f"is for {base} of another size than this model" if base in bases.OURS else f"is for {base}"


def _nothing_fits(
    base: str, named: list[str], keys: Keys, shapes: dict[str, tuple[int, ...]], found: _Found, model: TargetNames
) -> str:
    """Say what a file is that does nothing for this model, and what to do."""
    if keys.unread and not found.mismatched:
        return f"is of the kind {keys.unread}, which is not read here; save it as a LoRA, or choose another"
    # What stands beside adapters of no module of ours tells what they are a part of.
    other = bases.not_a_lora({key: shapes[key] for key in keys.strange} if named else shapes)
    if other is not None and not found.mismatched:
        whole = bases.is_foreign(base) and other.startswith("a whole")
        return f"is a whole {base} model, not a LoRA; {_CHOOSE}" if whole else f"is {other}"
    if not named:
        first = min(shapes)[:MAX_SHOWN]
        return f"holds no LoRA that is known here, first of {len(shapes)} tensors is {first!r}; {_CHOOSE}"
    if found.mismatched:
        first_one = found.mismatched[0]
        sizes = (
            f"module {first_one.module[:MAX_SHOWN]!r} is for {list(first_one.file_shape)}, "
            f"the model's is {list(first_one.model_shape)}"
        )
    else:
        sizes = f"none of its {len(named)} modules is in it, first {named[0][:MAX_SHOWN]!r}"
    return f"is not for this model: it {_whose(base, model)} ({sizes}); {_CHOOSE}"
