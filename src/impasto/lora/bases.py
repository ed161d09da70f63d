"""Which base model a LoRA file was made for, and what a file is that is no LoRA.

Knows how Stable Diffusion's models and files are laid out: widths, names of blocks, words of the metadata. Models with
other names are in ``families``. Reads no files and knows nothing of the model at hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from impasto.lora.families import foreign_family

SDXL, REFINER, SD1, SD2, UNKNOWN = "SDXL", "SDXL refiner", "SD 1.5", "SD 2", "unknown"
OURS = (SDXL, REFINER)
# SDXL's names and widths, all or some, on weights of their own: only metadata tell them, and their LoRAs can be used.
RELATIVES: Final = ("SSD-1B", "Segmind Vega", "KOALA", "Kolors", "Playground v2")

# A module of a text encoder, and of one that only SDXL and newer models have. The first is the same in SD 1.5, SDXL,
# SD 3 and Flux, the second in SDXL and SD 3, so neither tells what the rest of a file is for.
_TEXT = re.compile(
    r"(^|[._])(te\d?|text_encoders?(_\d)?|clip_[lgh]|t5xxl|text_model|conditioner|cond_stage_model)[._]"
    r"|(^|[._])encoder[._](layers|block)[._]\d+[._]|transformer[._]resblocks[._]\d"
)
_SECOND = re.compile(r"(^|[._])(te2|text_encoder_2|clip_g)[._](?!.*encoder[._]block[._])")
_ONLY_ONE = re.compile(r"(^|_)lora_te_")

# What a cross-attention's key and value read: the width of the text embedding, by which the families differ.
_CONTEXT = re.compile(r".*attn2[._](processor[._])?to_[kv]$")
_WIDTHS = {2048: SDXL, 1280: REFINER, 768: SD1, 1024: SD2}

# Names of modules that only one of the U-Nets has; the first that fits.
_NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (
            r"[78]_1_transformer_blocks_[2-9]_|blocks[._][12][._]attentions[._]\d[._]transformer_blocks[._][4-9][._]",
            SDXL,
        ),
        (r"input_blocks[._][12][._]1[._]|output_blocks[._](9|1[01])[._]1[._]", SD1),
        (r"down_blocks[._]0[._]attentions[._]|up_blocks[._]3[._]attentions[._]", SD1),
    )
)

# Words of what trainers note.
_RELATED: Final = (
    ("ssd-1b", "SSD-1B"), ("ssd_1b", "SSD-1B"), ("ssd1b", "SSD-1B"), ("segmind-vega", "Segmind Vega"),
    ("segmind_vega", "Segmind Vega"), ("koala-", "KOALA"), ("kolors", "Kolors"), ("playground-v2", "Playground v2"),
)  # fmt: skip
_WORDS: Final = (
    *_RELATED,
    ("xl-v1-refiner", REFINER), ("xl-refiner", REFINER), ("sdxl", SDXL), ("xl-v1", SDXL), ("xl_v1", SDXL),
    ("pony", SDXL), ("illustrious", SDXL), ("noobai", SDXL), ("animagine", SDXL),
    ("diffusion-v1", SD1), ("sd_v1", SD1), ("sd_1", SD1), ("sd1", SD1), ("diffusion-v2", SD2), ("sd_v2", SD2),
    ("sd_2", SD2), ("sd2", SD2), ("diffusion-3", "SD 3"), ("diffusion-v3", "SD 3"), ("sd3", "SD 3"), ("flux", "Flux"),
    ("wan2", "Wan"), ("wan-", "Wan"), ("wan_", "Wan"), ("qwen", "Qwen-Image"), ("hunyuan", "Hunyuan"),
    ("cascade", "Stable Cascade"), ("z-image", "Z-Image"), ("zimage", "Z-Image"), ("lumina", "Lumina"),
    ("pixart", "PixArt"), ("auraflow", "AuraFlow"), ("chroma", "Chroma"), ("hidream", "HiDream"), ("sana", "Sana"),
)  # fmt: skip
_METADATA: Final = ("modelspec.architecture", "ss_base_model_version")
_MODEL_NAME: Final = "ss_sd_model_name"
MOST_NOTED: Final = 1000  # characters of a note that are looked at

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
        (r"^(adapter\.)?body\.\d+\.(resnets|block\d|in_conv|skep)|^adapter\.(conv_in|body)", "a T2I-Adapter"),
        (
            r"^(params(_ema)?\.)?(conv_first|conv_body|trunk_conv|body\.\d+\.rdb\d)|^model\.\d+\.(sub\.|weight$)",
            "an upscaler",
        ),
        (r"^id_encoder\.", "an identity adapter (PhotoMaker)"),
        (r"^(visual|vision_model)\.|^image_encoder\.", "an image encoder"),
        (r"^\d{3,4}\.\d+\.linear\.", "a hypernetwork"),
        (
            r"^(text_model\.)?(encoder\.layers|transformer\.resblocks)\.\d+\.|^encoder\.block\.\d+\.layer\.",
            "a text encoder",
        ),
    )
)
_INSTEAD = {
    "a whole checkpoint": "load it as the model",
    "a whole UNet": "load it as the model",
    "a textual inversion": "give it as an embedding",
}
_EMBEDDING_WIDTHS = (768, 1024, 1280)


def of_text(module: str) -> bool:
    """Whether a module's name is one of a text encoder's."""
    return _TEXT.search(module) is not None


def is_foreign(base: str) -> bool:
    """Whether a base is known, and is neither SDXL nor one of its relatives."""
    return base not in (*OURS, *RELATIVES, UNKNOWN)


def base_of(modules: Mapping[str, tuple[int, ...] | None], metadata: Mapping[str, str]) -> str:
    """Tell the base model that a LoRA was made for.

    Args:
        modules: The file's modules with the shapes of the weights that they are for, where known.
        metadata: The header's strings, which are asked last, since they are often wrong; only what has SDXL's names
            and widths is taken for one of its relatives on their word.

    Returns:
        One of this file's words, or ``unknown``.
    """
    image = {name: shape for name, shape in modules.items() if not of_text(name)}
    noted = base_of_metadata(metadata)
    told = _of_image(image, noted)
    if noted in RELATIVES and told in (SDXL, None):
        return noted
    texts = modules.keys() - image.keys()
    if told is None and noted in (None, SD1, SD2) and any(map(_SECOND.search, texts)):
        return SDXL
    return told or noted or (SD1 if any(map(_ONLY_ONE.search, texts)) else UNKNOWN)


def base_of_metadata(metadata: Mapping[str, str]) -> str | None:
    """Tell the base model by what the trainer wrote down."""
    texts = [(_MODEL_NAME, _RELATED), *((key, _WORDS) for key in _METADATA)]
    notes = [(metadata.get(key, "")[:MOST_NOTED].lower(), words) for key, words in texts]
    found = (family for text, words in notes for word, family in words if word in text)
    return next(found, SD2 if metadata.get("ss_v2") == "True" else None)


def not_a_lora(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say what a file is whose tensors are no adapters, and what to do with it; ``None`` if it cannot be told."""
    for pattern, kind in _OTHERS:
        if any(pattern.search(key) for key in shapes):
            return f"{kind}, not a LoRA; {_INSTEAD.get(kind, 'choose a LoRA for SDXL')}"
    if len(shapes) == 1 and next(iter(shapes.values()))[-1:] in {(width,) for width in _EMBEDDING_WIDTHS}:
        return "a textual inversion, not a LoRA; give it as an embedding"
    return None


def _of_image(modules: Mapping[str, tuple[int, ...] | None], noted: str | None) -> str | None:
    """Tell the base model by the modules that are not a text encoder's: by families' names first, then by widths."""
    if family := foreign_family(modules):
        return family
    widths = [shape[1] for name, shape in modules.items() if shape and len(shape) > 1 and _CONTEXT.match(name)]
    if by_width := _most_common(_WIDTHS[width] for width in widths if width in _WIDTHS):
        return by_width
    by_name = _most_common(family for name in modules if (family := _by_name(name)))
    return SD2 if by_name == SD1 and noted == SD2 else by_name  # whose names are the same


def _by_name(name: str) -> str | None:
    return next((family for pattern, family in _NAMES if pattern.search(name)), None)


def _most_common(words: Iterable[str]) -> str | None:
    return next((word for word, _ in Counter(words).most_common(1)), None)
