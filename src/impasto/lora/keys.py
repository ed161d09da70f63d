"""Names: which module of the model a tensor of a LoRA file belongs to.

Knows the spellings in use (kohya with the original SDXL block names or with diffusers names, PEFT in diffusers) and
SDXL's block layout. Knows no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

# Prefix in the file -> network.
FLAT_PREFIXES = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
DOTTED_PREFIXES = {"unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"}

_ORIGINAL_BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d+)_|(middle_block)_(\d+)_")
_RESNET_PARTS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_TOP_LEVEL = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_PER_LEVEL = 3  # original blocks a level: two layers and one resampler, SDXL's layers_per_block being 2


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter of the model: which network, its module's dotted name in it, and which parameter of the module."""

    network: str
    module: str
    parameter: Literal["weight", "bias"] = "weight"


class TargetNames:
    """Finds modules by any spelling.

    Args:
        modules: Names of the modules with a weight, by network.
    """

    def __init__(self, modules: Mapping[str, Iterable[str]]) -> None:
        self._flat = {
            (network, _flatten(name)): Target(network, name) for network, names in modules.items() for name in names
        }

    def find(self, name: str) -> Target | None:
        """Return the module that ``name`` (a key without its tensor suffix) means, or ``None``."""
        for prefix, network in FLAT_PREFIXES.items():
            if name.startswith(prefix):
                return self._lookup(network, name.removeprefix(prefix))
        for prefix, network in DOTTED_PREFIXES.items():
            if name.startswith(prefix):
                return self._lookup(network, _flatten(name.removeprefix(prefix)))
        return None

    def _lookup(self, network: str, flat: str) -> Target | None:
        if network == "unet":
            return self._flat.get((network, flat)) or self._flat.get((network, _from_original(flat)))
        return self._flat.get((network, _flatten(flat)))


def _flatten(name: str) -> str:
    """One spelling for both: dots to underscores, and without ``text_model``, which transformers 5.6 dropped."""
    return name.replace(".", "_").removeprefix("text_model_")


def _from_original(flat: str) -> str:
    """Translate the original SDXL block names to diffusers', both flat; other names come back as they are."""
    if flat in _TOP_LEVEL:
        return _TOP_LEVEL[flat]
    match = _ORIGINAL_BLOCK.match(flat)
    if match is None:
        return flat
    rest = flat[match.end() :]
    if match[4]:
        part = int(match[5])
        return f"mid_block_attentions_0_{rest}" if part == 1 else f"mid_block_resnets_{part // 2}_{_resnet(rest)}"
    index, part = int(match[2]), int(match[3])
    if match[1] == "input_blocks":
        level, layer = divmod(index - 1, _PER_LEVEL)
        if layer == 2:  # the level's third block is its downsampler
            return f"down_blocks_{level}_downsamplers_0_conv"
        side = "down_blocks"
    else:
        level, layer = divmod(index, _PER_LEVEL)
        side = "up_blocks"
        if rest.startswith("conv"):
            return f"up_blocks_{level}_upsamplers_0_conv"
    if part == 1:
        return f"{side}_{level}_attentions_{layer}_{rest}"
    return f"{side}_{level}_resnets_{layer}_{_resnet(rest)}"


def _resnet(rest: str) -> str:
    return _RESNET_PARTS.get(rest, rest)
