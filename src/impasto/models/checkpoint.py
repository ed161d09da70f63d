"""Single-file checkpoints: which kind of model a file is, and its networks' tensors under diffusers' names.

Knows the safetensors format and how the field's checkpoints are laid out. Knows no classes of networks. Every key of
a file is used, or is known to carry no weights, or loading fails and names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from impasto.errors import ModelError
from impasto.models import original
from impasto.models.original import State

END_TOKEN = 49407  # of CLIP's vocabulary
CONTEXT_WIDTHS = {2048: "SDXL base", 1280: "SDXL refiner", 768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}

# What a file is, by a part of a name that only it has; the first that fits.
_KINDS: tuple[tuple[str, str], ...] = (
    (".lora_down.", "a LoRA: give it with --lora, or as a request's loras"),
    (".lora_A.", "a LoRA: give it with --lora, or as a request's loras"),
    (".hada_w1", "a LoRA (LoHa): give it with --lora, or as a request's loras"),
    (".lokr_w1", "a LoRA (LoKr): give it with --lora, or as a request's loras"),
    ("double_blocks.", "a Flux model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("control_model.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("cond_stage_model.transformer.", "a Stable Diffusion 1 checkpoint"),
    ("cond_stage_model.model.", "a Stable Diffusion 2 checkpoint"),
    ("patch_embedding.", "a Wan video model"),
    ("emb_params", "a textual-inversion embedding"),
    ("string_to_param", "a textual-inversion embedding"),
    ("clip_g", "a textual-inversion embedding"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An SDXL base checkpoint taken apart: configuration and tensors of each network."""

    name: str
    unet: State
    vae: State
    text_encoder: State
    text_encoder_2: State
    scheduler_config: dict[str, Any]


def read_checkpoint(path: Path, name: str) -> Checkpoint:
    """Read an SDXL base checkpoint in the original layout (``.safetensors``).

    Raises:
        ModelError: The file is broken, not safetensors, or another kind of model; the message says which.
    """
    tensors = _tensors(path, name)
    _refuse_other_kinds(tensors, name)
    parts = {
        prefix: _part(tensors, prefix) for prefix in (original.UNET, original.VAE, original.CLIP_L, original.CLIP_G)
    }
    left = [key for key in tensors if not key.startswith(tuple(parts)) and not original.NOT_WEIGHTS.match(key)]
    if left:
        raise ModelError(f"model {name!r}: {len(left)} tensors are not SDXL's, first {min(left)!r}")
    return Checkpoint(
        name,
        unet=_converted(original.convert_unet, parts[original.UNET], name),
        vae=_converted(original.convert_vae, parts[original.VAE], name),
        text_encoder=parts[original.CLIP_L],
        text_encoder_2=_converted(original.convert_clip_g, parts[original.CLIP_G], name),
        scheduler_config={
            # Trainers mark these two kinds by an empty tensor; nothing else in the file tells them.
            "prediction_type": "v_prediction" if "v_pred" in tensors else "epsilon",
            "rescale_betas_zero_snr": "ztsnr" in tensors,
            "timestep_spacing": "trailing" if "ztsnr" in tensors else "leading",
            "steps_offset": 1,
            "set_alpha_to_one": False,
        },
    )


def _tensors(path: Path, name: str) -> State:
    if path.suffix not in (".safetensors", ".sft"):
        raise ModelError(f"model {name!r}: only .safetensors checkpoints are loaded; a pickle could run anything")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model {name!r} is not a whole safetensors file ({error}); fetch it again") from None


def _refuse_other_kinds(tensors: State, name: str) -> None:
    """Name a file for what it is, unless it is an SDXL base checkpoint."""
    if any(key.startswith(original.CLIP_G) for key in tensors) and any(
        key.startswith(original.UNET) for key in tensors
    ):
        return
    if any(key.startswith(original.CLIP_G_ALONE) for key in tensors):
        raise ModelError(f"model {name!r} is an SDXL refiner: it continues a base model's pictures and starts none")
    for part, kind in _KINDS:
        if any(part in key for key in tensors):
            raise ModelError(f"model {name!r} is {kind}, not an SDXL base checkpoint")
    if any(key.startswith("down_blocks.") for key in tensors):
        raise ModelError(f"model {name!r} is a UNet alone in diffusers' layout; give the whole folder")
    if any(key.startswith(original.UNET) for key in tensors):
        raise ModelError(f"model {name!r} is a {_by_context(tensors)} UNet without its text encoders")
    raise ModelError(
        f"model {name!r} is no checkpoint we know: first of {len(tensors)} tensors is {min(tensors, default='-')!r}"
    )


def _by_context(tensors: State) -> str:
    """Tell the family by the width its cross-attention reads."""
    widths = (tensor.shape[-1] for key, tensor in tensors.items() if key.endswith("attn2.to_k.weight"))
    return CONTEXT_WIDTHS.get(next(widths, 0), "unknown")


def _part(tensors: State, prefix: str) -> State:
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and not original.NOT_WEIGHTS.match(key)
    }


def _converted(convert: Callable[[State], State], part: State, name: str) -> State:
    if not part:
        raise ModelError(f"model {name!r}: a network is missing; SDXL needs UNet, VAE and both text encoders")
    try:
        return convert(part)
    except KeyError as error:
        raise ModelError(f"model {name!r}: tensor {error.args[0]!r} is not SDXL's") from None
