"""Which model a name means: the built-in one, a folder or file on disk, or a repository of the hub.

Knows names, folders and what a model folder must hold. Loads nothing and imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impasto.errors import ModelError
from impasto.models.header import read_header
from impasto.models.kinds import UNET_CHANNELS, Kind, checkpoint_kind

BUILTIN = "builtin"
TEST_PATTERN = "fake"  # a model's name that stands for none: pictures and videos of it are patterns
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
BUILTIN_NATIVE_SIDE = 512  # pixels; the size it draws best
SDXL_NATIVE_SIDE = 1024
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
BASE_ONLY = ("text_encoder", "tokenizer")  # what a refiner does without
PIPELINE = "StableDiffusionXLPipeline"
INPAINT_PIPELINE = "StableDiffusionXLInpaintPipeline"
IMAGE_PIPELINE = "StableDiffusionXLImg2ImgPipeline"
PIPELINES: dict[str, Kind] = {PIPELINE: "base", INPAINT_PIPELINE: "inpaint", IMAGE_PIPELINE: "base"}
HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(?P<file>/(?:\w[\w.-]*/)*\w[\w.-]*\.safetensors)?"
    r"(?:@(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)

Fetch = Callable[[str, str | None, str | None], Path]  # repository, revision, file


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found on disk.

    Attributes:
        name: What the user called it.
        path: A diffusers folder with ``model_index.json``, or a single-file checkpoint.
        index: The content of ``model_index.json``; empty for a checkpoint.
        native_side: Side of the square pictures it draws best, in pixels.
        kind: ``base``; ``inpaint``, whose UNet also reads a mask; or ``refiner``, which continues pictures.
    """

    name: str
    path: Path
    index: dict[str, Any]
    native_side: int
    kind: Kind


def find_model(name: str, fetch: Fetch | None = None) -> ModelSource:
    """Find the model called ``name``.

    Args:
        name: ``builtin``; the path of a diffusers folder or a ``.safetensors`` checkpoint; or of the hub
            ``owner/name``, ``owner/name/file.safetensors``, either with ``@revision``. A path that exists wins.
        fetch: Brings a repository's model to disk; by default ``hub.fetch_model``.

    Raises:
        ModelError: Nothing there, or something that is not SDXL; the message says what it is.
    """
    if name == BUILTIN:
        return _folder(name, BUILTIN_FOLDER, BUILTIN_NATIVE_SIDE)
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError):  # a name that no path can have
        there = False
    if not there:
        path = _fetched(name, fetch)
    if path.is_file():
        return ModelSource(name, path, {}, SDXL_NATIVE_SIDE, checkpoint_kind(read_header(path, name), name))
    return _folder(name, path, SDXL_NATIVE_SIDE)


def motion_adapter(setting: str, model: str) -> str | None:
    """Return the motion adapter for videos from a model, or ``None`` if there is none.

    Args:
        setting: ``builtin``, a folder, a hub id; ``none``; or ``auto``: the built-in model's own, and no other's.
        model: The model's name.
    """
    if setting == "auto":
        return BUILTIN if model in (BUILTIN, TEST_PATTERN) else None
    return None if setting == "none" else setting


def check_roles(model: ModelSource, refiner: ModelSource | None) -> None:
    """Refuse a refiner in a base model's place, and the other way round.

    Raises:
        ModelError: One of them is of the wrong kind.
    """
    if model.kind == "refiner":
        raise ModelError(
            f"model {model.name!r} is an SDXL refiner: it continues a base model's pictures and starts none; "
            "give it as the refiner, beside a base model"
        )
    if refiner is not None and refiner.kind != "refiner":
        raise ModelError(f"model {refiner.name!r} is not a refiner but an SDXL {refiner.kind} model")


def _fetched(name: str, fetch: Fetch | None) -> Path:
    match = HUB_ID.fullmatch(name)
    if match is None or (match["file"] is None and match["repo"].endswith((".safetensors", ".ckpt"))):
        raise ModelError(
            f"model {name!r} was not found: give 'builtin', the path of a diffusers folder or .safetensors file, "
            "or a hub repository as owner/name"
        )
    file = match["file"] and match["file"].removeprefix("/")
    if fetch is not None:
        return fetch(match["repo"], match["revision"], file)
    from impasto.models.hub import fetch_model  # imports HTTP libraries, which few starts need

    return fetch_model(match["repo"], match["revision"], file)


def _folder(name: str, folder: Path, native_side: int) -> ModelSource:
    index = read_index(name, folder)
    kind = _folder_kind(index, folder)
    wanted = set(PARTS) - (set(BASE_ONLY) if kind == "refiner" else set())
    missing = [part for part in PARTS if part in wanted and not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"model {name!r}: the folder lacks {', '.join(missing)}")
    return ModelSource(name, folder, index, native_side, kind)


def _folder_kind(index: dict[str, Any], folder: Path) -> Kind:
    """Tell by the pipeline's class; and by the UNet, since a base model can be saved from the inpainting pipeline."""
    if index.get("requires_aesthetics_score") is True:
        return "refiner"
    try:
        channels = json.loads((folder / "unet" / "config.json").read_text())["in_channels"]
        return UNET_CHANNELS[channels]
    except (OSError, ValueError, KeyError, TypeError):
        return PIPELINES[index["_class_name"]]


def read_index(name: str, folder: Path) -> dict[str, Any]:
    """Read ``model_index.json`` of a model that the user called ``name``.

    Raises:
        ModelError: There is none, or it is of another kind of model.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except OSError:
        raise ModelError(f"model {name!r}: the folder has no model_index.json, so it is no diffusers model") from None
    except ValueError as error:
        raise ModelError(f"model {name!r}: model_index.json is not JSON ({error})") from None
    kind = str(index.get("_class_name")) if isinstance(index, dict) else None
    if kind not in PIPELINES:
        raise ModelError(f"model {name!r} is a {kind}, not an SDXL model ({', '.join(PIPELINES)})")
    return index  # type: ignore[no-any-return]
