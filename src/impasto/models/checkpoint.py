"""Single-file checkpoints: the networks' tensors of an SDXL file, under diffusers' names.

Knows how tensors are read and translated. Knows no classes of networks. Every key of a file is used, or is known to
carry no weights, or loading fails and names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from impasto.errors import ModelError
from impasto.models import kinds, original
from impasto.models.header import Header, read_header
from impasto.models.kinds import Kind, checkpoint_kind
from impasto.models.original import State

END_TOKEN = 49407  # of CLIP's vocabulary
ALL: Final = ("unet", "vae", "text")  # parts that can be asked for

_BASE = {"unet": kinds.UNET, "vae": kinds.VAE, "text_encoder": kinds.CLIP_L, "text_encoder_2": kinds.CLIP_G}
_REFINER = {"unet": kinds.UNET, "vae": kinds.VAE, "text_encoder_2": kinds.CLIP_G_ALONE}
_CONVERT: dict[str, Callable[[State], State]] = {
    "unet": original.convert_unet,
    "vae": original.convert_vae,
    "text_encoder": dict,  # the one network with transformers' own names
    "text_encoder_2": original.convert_clip_g,
}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An SDXL checkpoint taken apart.

    Attributes:
        networks: Tensors of each asked network: ``unet``, ``vae``, ``text_encoder`` (not of a refiner),
            ``text_encoder_2``.
        pooled: Width of the pooled text embedding.
    """

    name: str
    kind: Kind
    networks: dict[str, State]
    pooled: int
    scheduler_config: dict[str, Any]


def read_checkpoint(path: Path, name: str, parts: Collection[str] = ALL) -> Checkpoint:
    """Read an SDXL checkpoint in the original layout (``.safetensors``); of its networks, those of ``parts`` alone.

    Raises:
        ModelError: The file is broken, not safetensors, or another kind of model; the message says which.
    """
    header = read_header(path, name)
    kind = checkpoint_kind(header, name)
    prefixes = _REFINER if kind == "refiner" else _BASE
    _refuse_strangers(header, prefixes, name)
    wanted = {
        part: prefix for part, prefix in prefixes.items() if part in parts or ("text" in part and "text" in parts)
    }
    tensors = _tensors(path, name, tuple(wanted.values()))
    networks = {part: _converted(part, _part(tensors, prefix), name) for part, prefix in wanted.items()}
    return Checkpoint(name, kind, networks, _pooled(header, prefixes["text_encoder_2"]), _scheduler_config(header))


def _refuse_strangers(header: Header, prefixes: dict[str, str], name: str) -> None:
    """Insist on every network, and on nothing else."""
    known = tuple(prefixes.values())
    left = [key for key in header if not key.startswith(known) and not original.NOT_WEIGHTS.match(key)]
    if left:
        raise ModelError(f"model {name!r}: {len(left)} tensors are not SDXL's, first {min(left)[:100]!r}")
    for part, prefix in prefixes.items():
        if not any(key.startswith(prefix) for key in header):
            raise ModelError(f"model {name!r} has no {part}; give a checkpoint with UNet, VAE and text encoders")


def _pooled(header: Header, prefix: str) -> int:
    projection = header.get(prefix + "text_projection")
    return projection.shape[-1] if projection is not None and projection.shape else 0


def _scheduler_config(header: Header) -> dict[str, Any]:
    return {
        # Trainers mark these two kinds by an empty tensor; nothing else in the file tells them.
        "prediction_type": "v_prediction" if "v_pred" in header else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in header,
        "timestep_spacing": "trailing" if "ztsnr" in header else "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }


def _tensors(path: Path, name: str, prefixes: tuple[str, ...]) -> State:
    """Map the tensors into memory; the system reads each when it is used."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model {name!r} is not a whole safetensors file ({error}); fetch it again") from None


def _part(tensors: State, prefix: str) -> State:
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and not original.NOT_WEIGHTS.match(key)
    }


def _converted(part: str, state: State, name: str) -> State:
    try:
        return _CONVERT[part](state)
    except KeyError as error:
        raise ModelError(f"model {name!r}: {part}: tensor {error.args[0][:100]!r} is not SDXL's") from None
    except (ValueError, RuntimeError) as error:  # no levels at all, or shapes that cannot be taken apart
        raise ModelError(f"model {name!r}: {part}: tensors are missing or not shaped as SDXL's ({error})") from None
