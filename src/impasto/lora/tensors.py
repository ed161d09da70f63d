"""Keys of a LoRA file: which module each names, and which part of its adapter the tensor is.

Knows the suffixes of every kind in every spelling. Knows no model and no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache

from impasto.lora.courtesy import give_way

_SET = ("set_weight", "set_bias")
# Part of an adapter -> its suffixes, as patterns. ``%`` stands for PEFT's adapter name, which not every file has.
_SUFFIXES: dict[str, str] = {
    "down": r"\.lora_down(\.weight)?|\.lora_A%(\.weight)?|(\.lora|_lora|\.lora_linear_layer)\.down(\.weight)?",
    "up": r"\.lora_up(\.weight)?|\.lora_B%(\.weight)?|(\.lora|_lora|\.lora_linear_layer)\.up(\.weight)?",
    "mid": r"\.lora_mid(\.weight)?|\.lora\.mid(\.weight)?",
    "values": r"\.lora_E%(\.weight)?",
    **{f"embedding_{half}": rf"\.lora_embedding_{half}%" for half in "AB"},
    **{f"vera_{part}": rf"\.vera_lambda_{part}%(\.weight)?" for part in "bd"},
    "up_bias": r"\.lora_up\.bias|\.lora_B%\.bias",
    "alpha": r"(\.lora|_lora|\.lora_linear_layer)?\.(lora_)?alpha",
    "dora_scale": r"\.dora_scale(\.weight)?",
    "magnitude": r"\.lora_magnitude_vector%(\.weight)?",
    **{f"hada_{part}": rf"\.hada_{part}%(\.weight)?" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f"lokr_{part}": rf"\.lokr_{part}%(\.weight)?"
        for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
    },
    **{part: rf"\.{part}\.weight" for part in ("a1", "a2", "b1", "b2", "bm")},
    "oft_blocks": r"\.oft_blocks",
    "oft_diag": r"\.oft_diag",
    **{f"boft_{part}": rf"\.boft_{part}%(\.weight)?" for part in "Rs"},
    "rescale": r"\.rescale",
    "oft_R": r"\.oft_R%(\.weight)?",
    "scaled_oft": r"\.(oft_R%\.)?scaled_oft",
    "on_input": r"\.on_input",
    "ia3_l": r"\.ia3_l%(\.weight)?",
    **{part: rf"\.{part}" for part in ("diff", "diff_b", "w_norm", "b_norm", "reshape_weight", *_SET)},
}
_ADAPTER = r"(?:\.(?!weight|bias|scaled_oft)[\w-]+)?"
_PARTS = re.compile("|".join(f"(?P<{part}>{_suffix.replace('%', _ADAPTER)})" for part, _suffix in _SUFFIXES.items()))
_MOST_DOTS = 3  # in a suffix
_WEIGHT = ".weight"

# What is often packed beside a LoRA and is no part of it: textual-inversion embeddings, and notes of tools.
_BUNDLE = "bundle_emb."
_EMBEDDING = re.compile(
    r"(bundle_emb\.(?P<bundled>.+?)(\.(clip_[lg]|string_to_param|emb_params).*)?"
    r"|emb_params|(clip_[lg]|text_encoders_[01])(_out)?|string_to_(param|token).*|(?P<token><.*>))$"
)
_BESIDE = re.compile(
    r"(.*\.)?(position_ids|logit_scale|scaled_fp8|network_alpha|global_step|step|epoch)$|special_params|__.*__$"
)


# Whole weights and biases that PEFT trained and saved beside its adapters; its copies of the model's own are nothing.
_WHOLE = re.compile(r"(base_model\.model\..+?|.+?(?=\.base_layer\.|\.modules_to_save\.))\.(?P<part>weight|bias)")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.(?!weight|bias)[\w-]+)?)(?=\.(weight|bias)$)")
# Matrices that all modules of a VeRA share.
_SHARED = re.compile(r"(?P<prefix>(.*\.)?)(?P<part>vera_[AB])(\.[\w-]+)?")
# Kinds that are not read, by a word that only their keys have.
_UNREAD = re.compile(
    r"[._](?P<kind>fourierft|hra|bone|miss|shira|c3a|road|vblora|randlora|delora|waveft|psoft|gralora|hira|lily|unilora"
    r"|tinylora|frod|peanut|adamss|pvera|deft|beft|glora|osf|ln_tuning)_\w+|\.(?P<tlora>lambda_layer|[pq]_layer(\.weight)?)$"
)


@dataclass(slots=True)
class Keys:
    """The keys of a file, sorted.

    Attributes:
        modules: Module as the file names it -> part -> key.
        twice: Keys of a part that the module has already.
        beside: Keys of what is known to be no weight.
        strange: All others.
        shared: Part that modules share -> what stands before it, for the modules under that -> key.
        unread: Kind that is known by name and not read.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    shared: dict[str, dict[str, str]] = field(default_factory=dict)
    unread: str = ""


def sort_keys(keys: Collection[str]) -> Keys:
    """Group a file's keys by module. A plain ``weight`` is an adapter's (IA3) only where ``on_input`` stands beside."""
    found = Keys()
    for key in sorted(keys):
        give_way()
        if key.startswith(_BUNDLE):  # whatever its word looks like
            found.beside.append(key)
            continue
        if key.endswith(_WEIGHT) and key.removesuffix(_WEIGHT) + ".on_input" in keys:
            module, part = key.removesuffix(_WEIGHT), "weight"
        elif split := _split(key):
            module, part = split
        elif match := _SHARED.fullmatch(key):
            found.shared.setdefault(match["part"], {})[match["prefix"]] = key
            continue
        else:
            (found.beside if _BESIDE.match(key) or _EMBEDDING.match(key) else found.strange).append(key)
            continue
        if found.modules.setdefault(module, {}).setdefault(part, key) != key:
            found.twice.append(key)
    _sort_whole(found)
    unread = next((match for key in found.strange if (match := _UNREAD.search(key))), None)
    found.unread = "" if unread is None else (unread["kind"] or "T-LoRA").replace("_", "")
    return found


def bundled_word(key: str) -> str | None:
    """Return the word of an embedding that is packed beside a LoRA, empty if unknown; ``None``: it is none."""
    match = _EMBEDDING.match(key)
    return match and (match["bundled"] or match["token"] or "")


def _sort_whole(found: Keys) -> None:
    """Take whole weights that stand beside adapters for parts of their modules; alone they are no adapter."""
    if not found.modules:
        return
    strange, found.strange = found.strange, []
    for key in strange:
        plain = _WRAPPED.sub("", key)
        if ".original_module." in key:
            found.beside.append(key)
        elif match := _WHOLE.fullmatch(key):
            parts = found.modules.setdefault(plain.removesuffix(f".{match['part']}"), {})
            if parts.setdefault(f"set_{match['part']}", key) != key:
                found.beside.append(key)  # PEFT may save a module's bias twice
        else:
            found.strange.append(key)


def _split(key: str) -> tuple[str, str] | None:
    """Return module and part; of several suffixes the longest is meant."""
    for dots in range(_MOST_DOTS, 0, -1):
        module, *rest = key.rsplit(".", dots)
        suffix = "." + ".".join(rest)
        if module.endswith("_lora") and (part := _part_of("_lora" + suffix)):
            return module.removesuffix("_lora"), part
        if module and len(rest) == dots and (part := _part_of(suffix)):
            return module, part
    return None


@lru_cache(maxsize=1024)
def _part_of(suffix: str) -> str | None:
    match = _PARTS.fullmatch(suffix)
    return match.lastgroup if match else None
