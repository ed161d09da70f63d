"""Which model a name means: the built-in one, or a folder on disk.

Knows names, folders and what a model folder must hold. Loads nothing and imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impasto.errors import ModelError

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
BUILTIN_NATIVE_SIDE = 512  # pixels; the size it draws best
SDXL_NATIVE_SIDE = 1024
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PIPELINE = "StableDiffusionXLPipeline"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found on disk.

    Attributes:
        name: What the user called it.
        path: A diffusers folder with ``model_index.json``, or a single-file checkpoint.
        index: The content of ``model_index.json``; empty for a checkpoint.
        native_side: Side of the square pictures it draws best, in pixels.
    """

    name: str
    path: Path
    index: dict[str, Any]
    native_side: int


def find_model(name: str) -> ModelSource:
    """Find the model called ``name``: ``builtin``, or the path of a diffusers folder or a ``.safetensors`` checkpoint.

    Raises:
        ModelError: Nothing there, or something that is not an SDXL folder; the message says what it is.
    """
    builtin = name == BUILTIN
    folder = BUILTIN_FOLDER if builtin else Path(name).expanduser()
    if folder.is_file():
        return ModelSource(name, folder, {}, SDXL_NATIVE_SIDE)
    index = _read_index(name, folder)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"model {name!r}: the folder lacks {', '.join(missing)}")
    return ModelSource(name, folder, index, BUILTIN_NATIVE_SIDE if builtin else SDXL_NATIVE_SIDE)


def _read_index(name: str, folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(
            f"model {name!r} was not found: give 'builtin', or the path of a diffusers folder or .safetensors file"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except FileNotFoundError:
        raise ModelError(f"model {name!r}: the folder has no model_index.json, so it is no diffusers model") from None
    except ValueError as error:
        raise ModelError(f"model {name!r}: model_index.json is not JSON ({error})") from None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != PIPELINE:
        raise ModelError(f"model {name!r} is a {kind}, not an SDXL base model ({PIPELINE})")
    return index  # type: ignore[no-any-return]
