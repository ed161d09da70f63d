"""Which base model a LoRA file was made for, and what a file is that is no LoRA.

Knows how the field's models and files are laid out: widths, names of blocks, words of the metadata. Reads no files and
knows nothing of the model at hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

SDXL, REFINER, SD1, SD2, UNKNOWN = "SDXL", "SDXL refiner", "SD 1.5", "SD 2", "unknown"
OURS = (SDXL, REFINER)

# What a cross-attention's key and value read: the width of the text embedding, by which the families differ.
_CONTEXT = re.compile(r".*attn2[._](processor[._])?to_[kv]$")
_WIDTHS = {2048: SDXL, 1280: REFINER, 768: SD1, 1024: SD2}

# Names of modules that only one family has; the first that fits.
_NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"motion_modules[._]", "AnimateDiff"),
        (r"lora_prior_", "Stable Cascade"),
        (r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]\d", "Flux"),
        (r"(^|[._])joint_blocks[._]\d|(^|[._])transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj", "SD 3"),
        (r"(^|[._])transformer_blocks[._]\d+[._](img|txt)_m(lp|od)", "Qwen-Image"),
        (r"(^|diffusion_model[._]|transformer[._]|unet_)blocks[._]\d+[._](cross_attn|self_attn|ffn)[._]", "Wan"),
        (r"^(lora_)?(transformer[._]|diffusion_model[._]|unet_)?(transformer_)?(blocks|layers)[._]\d", "a transformer"),
        (r"(^|[._])(te2|text_encoder_2|clip_g)[._]", SDXL),
        (
            r"[78]_1_transformer_blocks_[2-9]_|blocks[._][12][._]attentions[._]\d[._]transformer_blocks[._][4-9][._]",
            SDXL,
        ),
        (r"input_blocks[._][12][._]1[._]|output_blocks[._](9|1[01])[._]1[._]", SD1),
        (r"down_blocks[._]0[._]attentions[._]|up_blocks[._]3[._]attentions[._]|(^|_)lora_te_", SD1),
    )
)

# Words of ``modelspec.architecture`` and ``ss_base_model_version``.
_WORDS: tuple[tuple[str, str], ...] = (
    ("xl-v1-refiner", REFINER), ("xl-refiner", REFINER), ("sdxl", SDXL), ("xl-v1", SDXL), ("xl_v1", SDXL),
    ("diffusion-v1", SD1), ("sd_v1", SD1), ("sd_1", SD1), ("sd1", SD1), ("diffusion-v2", SD2), ("sd_v2", SD2),
    ("sd_2", SD2), ("sd2", SD2), ("diffusion-3", "SD 3"), ("diffusion-v3", "SD 3"), ("sd3", "SD 3"), ("flux", "Flux"),
    ("wan", "Wan"), ("qwen", "Qwen-Image"), ("hunyuan", "Hunyuan"), ("cascade", "Stable Cascade"), ("lumina", "Lumina"),
    ("pony", SDXL), ("illustrious", SDXL),
)  # fmt: skip
_METADATA = ("modelspec.architecture", "ss_base_model_version")

# What a file without adapters is, by names that only it has; the first that fits.
_OTHERS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"(^|\.)control_model\.|input_hint_block\.|^controlnet_|^lllite_|^lora_controlnet$", "a ControlNet"),
        (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter"),
        (r"motion_modules\.", "an AnimateDiff motion module"),
        (
            r"^(conditioner\.embedders|cond_stage_model|first_stage_model|model\.diffusion_model)\.",
            "a whole checkpoint",
        ),
        (r"^bundle_emb\.|^emb_params$|^string_to_param|^(clip_[lg]|text_encoders_[01])$|^<.*>$", "a textual inversion"),
        (r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.\d+\.", "a Flux model"),
        (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 model"),
        (r"(^|\.)blocks\.\d+\.(cross_attn|self_attn)\.", "a Wan model"),
        (r"^(unet\.)?(down|up)_blocks\.\d+\..*\.(weight|bias)$|^input_blocks\.\d+\.\d+\.", "a whole UNet"),
        (r"^(vae\.)?(encoder|decoder|quant_conv|post_quant_conv)\.(conv_in|mid|down|up|weight)", "a VAE"),
        (r"^(text_model\.)?(encoder\.layers|transformer\.resblocks)\.\d+\.", "a text encoder"),
    )
)
_INSTEAD = {
    "a whole checkpoint": "load it as the model",
    "a whole UNet": "load it as the model",
    "a textual inversion": "give it as an embedding",
}
_EMBEDDING_WIDTHS = (768, 1024, 1280)


def base_of(modules: Mapping[str, tuple[int, ...] | None], metadata: Mapping[str, str]) -> str:
    """Tell the base model that a LoRA was made for.

    Args:
        modules: The file's modules with the shapes of the weights that they are for, where known.
        metadata: The header's strings, which are asked last, since they are often wrong.

    Returns:
        One of this file's words, or ``unknown``.
    """
    widths = [shape[1] for name, shape in modules.items() if shape and len(shape) > 1 and _CONTEXT.match(name)]
    by_width = _most_common(_WIDTHS[width] for width in widths if width in _WIDTHS)
    names = list(modules)
    by_name = _most_common(family for name in names if (family := _by_name(name)))
    return _foreign(by_name, names) or by_width or by_name or base_of_metadata(metadata) or UNKNOWN


def base_of_metadata(metadata: Mapping[str, str]) -> str | None:
    """Tell the base model by what the trainer wrote down."""
    for key in _METADATA:
        words = metadata.get(key, "").lower()
        for word, family in _WORDS:
            if word in words:
                return family
    return SD2 if metadata.get("ss_v2") == "True" else None


def not_a_lora(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say what a file is whose tensors are no adapters, and what to do with it; ``None`` if it cannot be told."""
    for pattern, kind in _OTHERS:
        if any(pattern.search(key) for key in shapes):
            return f"{kind}, not a LoRA; {_INSTEAD.get(kind, 'choose a LoRA for SDXL')}"
    if len(shapes) == 1 and next(iter(shapes.values()))[-1:] in {(width,) for width in _EMBEDDING_WIDTHS}:
        return "a textual inversion, not a LoRA; give it as an embedding"
    return None


def _by_name(name: str) -> str | None:
    return next((family for pattern, family in _NAMES if pattern.search(name)), None)


def _foreign(family: str | None, names: Collection[str]) -> str | None:
    """Return the family if it is no U-Net's and most of the names are its own: then widths mean nothing."""
    if family is None or family in (SDXL, REFINER, SD1, SD2):
        return None
    own = sum(_by_name(name) == family for name in names)
    return family if 2 * own > len(names) else None


def _most_common(words: Iterable[str]) -> str | None:
    return next((word for word, _ in Counter(words).most_common(1)), None)
