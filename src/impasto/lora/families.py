"""Families of models that are no SDXL, told by the names of the modules that a LoRA has for them.

Knows the names of the blocks of the field's transformers and U-Nets, in the original's and in diffusers' spelling, flat
or dotted. Knows no shapes beyond the width that a module reads, no files and no metadata.

Source: the models' own classes (diffusers' ``models/transformers`` and the authors' repositories).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

Modules = Mapping[str, tuple[int, ...] | None]  # name -> shape of the weight it is for, (outputs, inputs), where told

TRANSFORMER: Final = "a transformer"  # of no family that is known here

# Words before a module's name: trainers' and those of pipelines.
_START: Final = (
    r"^(?:(?:lora|lycoris|oft|boft|base[._]model|model|module|_orig_mod|unet|transformer|diffusion_model|dit|net)[._])*"
)
# Names that no U-Net of the Stable Diffusion kind has. Its own ``transformer_blocks`` stand inside a block.
_FOREIGN: Final = re.compile(
    rf"motion_modules[._]|lora_prior_|(up|down)_blocks[._]\d+[._]\d+[._]attention[._]|attentions[._]\d[._]add_[kv]_proj"
    rf"|{_START}(?:[a-z]+_){{0,3}}(?:blocks|layers|refiner)[._]\d+[._](?!\d|resnets|attentions|(down|up)samplers)"
    rf"|{_START}(?:double|single)_layers[._]\d"
    rf"|{_START}(?:img_in|txt_in|x_embedder|context_embedder|final_layer|proj_out|norm_out|time_text_embed|adaln_single"
    rf"|caption_projection|patch_embed\w*|condition_embedder|distilled_guidance_layer|time_guidance_embed)([._]|$)"
)

# Family -> a name that only it has; of a file's families the first is meant, since the later share their names with
# the earlier.
_NAMES: Final[tuple[tuple[str, re.Pattern[str]], ...]] = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("AnimateDiff", r"motion_modules[._]"),
        ("Stable Cascade", r"lora_prior_|(up|down)_blocks[._]\d+[._]\d+[._]attention[._]"),
        ("Kandinsky", r"attentions[._]\d[._]add_[kv]_proj|(visual|text)_transformer_blocks[._]\d"),
        ("AuraFlow", r"joint_transformer_blocks[._]\d|(double|single)_layers[._]\d"),
        ("HiDream", r"(double|single)_stream_blocks[._]\d"),
        ("Hunyuan", r"double_blocks.*(\.img_attn_qkv|_mlp[._]fc\d)|token_refiner|single_blocks.*modulation[._]linear"),
        ("Chroma", r"distilled_guidance_layer"),
        ("Flux", r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
        ("Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_m(lp|od)"),
        ("SD 3", r"joint_blocks[._]\d|transformer_blocks[._]\d+[._](attn2?[._](add_[qkv]_proj|to_add_out)|ff_context)"),
        ("Lumina", r"(noise|context)_refiner[._]\d|layers[._]\d+[._](attention|feed_forward|adaLN_modulation)[._]"),
        ("PixArt", r"blocks[._]\d+[._](cross_)?attn[._](q_linear|kv_linear|qkv)|(adaln_single|caption_projection)[._]"),
        ("Cosmos", r"blocks[._]\d+[._](self|cross)_attn[._][qkv]_proj"),
        ("Wan", r"blocks[._]\d+[._]((self|cross)_attn[._](norm_)?([qkvo]|[kv]_img)$|ffn[._])|condition_embedder[._]"),
        ("Hunyuan", r"(^|[._])blocks[._]\d+[._](attn[12][._](Wqkv|q_proj|kv_proj|out_proj)|skip_linear)"),
    )
)
# What the attention of a family's blocks reads, where its names alone are many families'.
_ATTENTION: Final = re.compile(
    r"(blocks|layers|refiner)[._]\d+[._](attn[12]?|attention)[._](to_[qkv]|qkv|add_[qkv]_proj)$"
)
_WIDTHS: Final[Mapping[tuple[str, int], str]] = {
    ("SD 3", 3072): "Flux or Qwen-Image", ("Lumina", 3840): "Z-Image", (TRANSFORMER, 3840): "Z-Image",
    (TRANSFORMER, 2304): "Lumina", (TRANSFORMER, 1536): "SD 3", (TRANSFORMER, 2432): "SD 3",
    (TRANSFORMER, 1152): "PixArt", (TRANSFORMER, 2240): "Sana", (TRANSFORMER, 2048): "LTX-Video",
    (TRANSFORMER, 4096): "LTX-Video", (TRANSFORMER, 1920): "CogVideoX", (TRANSFORMER, 1408): "Hunyuan",
    (TRANSFORMER, 5120): "Wan",
}  # fmt: skip


def foreign_family(modules: Modules) -> str | None:
    """Return the family that most of the modules are for; ``None`` where they may be a U-Net's."""
    foreign = [name for name in modules if _FOREIGN.search(name)]
    if not foreign or 2 * len(foreign) <= len(modules):
        return None
    family = next((family for family, sign in _NAMES if any(map(sign.search, foreign))), TRANSFORMER)
    widths = [shape[1] for name in foreign if (shape := modules[name]) and _ATTENTION.search(name)]
    return next((told for width in widths if (told := _WIDTHS.get((family, width)))), family)
