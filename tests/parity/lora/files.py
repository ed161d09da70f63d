"""LoRA files of any kind in any spelling, with what a right reader must make of them.

Knows how to put adapters, names and strays together and write them. The same seed gives the same file.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from impasto.lora.keys import Target
from tests.parity.lora.adapters import ALPHAS, DTYPES, KINDS, Alpha, Draw, Formula
from tests.parity.lora.networks import Networks
from tests.parity.lora.spellings import SPELLINGS, Spelling
from tests.random_sdxl import WIDTHS

PER_LAYER = 2  # modules of each layer type in a file


@dataclass
class LoraCase:
    """A file, and what must come of it.

    Attributes:
        name: Kind, spelling, alpha and dtype, for failures.
        path: The file.
        wanted: Formula of each parameter that changes.
        kinds: Word of the report for each of them.
        unmatched: Modules that the model has not.
        mismatched: Modules of another shape.
        ignored: Keys beside.
        words: Words that it brings vectors for.
        layers: Layer types in it.
    """

    name: str
    path: Path
    wanted: dict[Target, Formula] = field(default_factory=dict)
    kinds: dict[Target, str] = field(default_factory=dict)
    unmatched: set[str] = field(default_factory=set)
    mismatched: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


def write_case(
    networks: Networks, path: Path, kind: str, spelling: str, alpha: Alpha, dtype: str = "float32", seed: int = 0
) -> LoraCase | None:
    """Write a file with a few modules of every layer type that the kind and the spelling know; ``None`` if none do."""
    case = LoraCase(f"{kind} / {spelling} / alpha {alpha.name} / {dtype} / {seed}", path)
    tensors: dict[str, Tensor] = {}
    draw = Draw(seed, DTYPES[dtype])
    for layer in KINDS[kind][1]:
        for target in _some(networks.layers[layer], draw):
            tensors |= _module(case, networks, target, kind, SPELLINGS[spelling], alpha, draw, layer)
    if not tensors:
        return None
    tensors |= _strays(case, networks, SPELLINGS[spelling], draw)
    save_file(tensors, path)
    return case


def write_mixture(networks: Networks, path: Path, seed: int) -> LoraCase:
    """Write a file in which each module has a kind, a spelling, an alpha and a dtype of its own."""
    case = LoraCase(f"mixture {seed}", path)
    tensors: dict[str, Tensor] = {}
    dice = Draw(seed, torch.float32)
    names, dtypes = tuple(SPELLINGS), tuple(DTYPES)
    for layer, targets in networks.layers.items():
        kinds = tuple(kind for kind, (_, layers, _) in KINDS.items() if layer in layers)
        for target in targets[dice.choice(4) :: 5]:
            kind = kinds[dice.choice(len(kinds))]
            draw = Draw(seed * 1000 + len(tensors), DTYPES[dtypes[dice.choice(len(dtypes))]])
            spelling, alpha = SPELLINGS[names[dice.choice(len(names))]], ALPHAS[dice.choice(len(ALPHAS))]
            tensors |= _module(case, networks, target, kind, spelling, alpha, draw, layer)
    save_file(tensors, path)
    return case


def _some(targets: tuple[Target, ...], draw: Draw) -> list[Target]:
    start = draw.choice(len(targets))
    step = max(1, len(targets) // PER_LAYER)
    return [targets[(start + i * step) % len(targets)] for i in range(min(PER_LAYER, len(targets)))]


def _module(
    case: LoraCase,
    networks: Networks,
    target: Target,
    kind: str,
    spelling: Spelling,
    alpha: Alpha,
    draw: Draw,
    layer: str,
) -> dict[str, Tensor]:
    """Return one module's tensors by key and note what they mean; nothing where the scheme cannot write it."""
    name = spelling.module(networks, target)
    if name is None or (spelling.no_conv and kind.startswith("OFTv2") and layer in ("1x1", "3x3")):
        return {}
    maker, _, word = KINDS[kind]
    made = maker(networks.shape(target), draw, alpha)
    if not spelling.writes(made.parts):
        return {}
    bias = Target(target.network, target.module, "bias")
    case.layers.add(layer)
    if made.weight is not None:
        case.wanted[target], case.kinds[target] = made.weight, word
    if made.bias is not None and networks.has_bias(target):
        case.wanted[bias], case.kinds[bias] = made.bias, "norm" if word == "norm" else "bias"
    elif made.bias is not None:
        case.unmatched.add(f"{_shown(name)}.bias")
    return {spelling.key(name, part): tensor.contiguous() for part, tensor in made.parts.items()}


def _strays(case: LoraCase, networks: Networks, spelling: Spelling, draw: Draw) -> dict[str, Tensor]:
    """Add what real files have beside: a module nobody knows, one of another width, an embedding, a lone alpha."""
    tensors: dict[str, Tensor] = {}
    if draw.choice(2):
        tensors |= {f"lora_unet_nowhere.lora_{half}.weight": torch.ones(4, 4) for half in ("up", "down")}
        case.unmatched.add("lora_unet_nowhere")
    if draw.choice(2):
        free = [target for target in networks.layers["linear"] if target not in case.wanted]
        target = free[draw.choice(len(free))]
        name = SPELLINGS["kohya, diffusers names"].module(networks, target)
        out, inputs = networks.shape(target)
        tensors |= {f"{name}.lora_up.weight": torch.ones(out, 2), f"{name}.lora_down.weight": torch.ones(2, inputs + 1)}
        case.mismatched.add(str(name))
    if draw.choice(2):
        tensors |= {"bundle_emb.inkwash.clip_l": torch.ones(2, 16), "lora_unet_lonely.alpha": torch.tensor(1.0)}
        case.ignored |= {"bundle_emb.inkwash.clip_l", "lora_unet_lonely.alpha"}
    if draw.choice(2):
        tensors |= {f"bundle_emb.<wash>.clip_{i}": draw.tensor(3, width) for i, width in zip("lg", WIDTHS, strict=True)}
        case.words.add("<wash>")
    return tensors


def _shown(name: str) -> str:
    """The module as the report names it: without the ``_lora`` that processors put behind."""
    return name.removesuffix("_lora")
