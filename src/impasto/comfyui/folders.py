"""Files by the names that ComfyUI lists them under.

Knows ComfyUI's folders of models, wherever its configuration puts them. Reads no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import folder_paths  # type: ignore[import-not-found]

from impasto.errors import LoraError, ModelError
from impasto.models.catalog import BUILTIN_FOLDER

NONE: Final = "None"  # in a list of names, for no file
ENDING: Final = ".safetensors"


def lora_names() -> list[str]:
    """Return what a node offers: none, and the files of the ``loras`` folders."""
    return [NONE, *folder_paths.get_filename_list("loras")]


def lora_file(name: str) -> Path:
    """Find a LoRA, with or without the ending of its name; also one of those that come with the built-in model.

    Raises:
        LoraError: There is none.
    """
    for spelled in (name, name + ENDING):
        if (found := folder_paths.get_full_path("loras", spelled)) is not None:
            return Path(found)
    builtin = {file.stem: file for file in (BUILTIN_FOLDER / "loras").glob("*" + ENDING)}
    if name.removesuffix(ENDING) in builtin:
        return builtin[name.removesuffix(ENDING)]
    raise LoraError(called(name), "is in none of ComfyUI's loras folders; put the file there, or choose another")


def checkpoint_file(name: str) -> Path:
    """Find a checkpoint.

    Raises:
        ModelError: It is in none of the folders.
    """
    found = folder_paths.get_full_path("checkpoints", name)
    if found is None:
        raise ModelError(f"checkpoint {name!r} is in none of ComfyUI's checkpoints folders; put the file there")
    return Path(found)


def fingerprint(file: Path) -> str:
    """Return text that is another one when the file is; ComfyUI wants something that JSON can hold."""
    stat = file.stat()
    return f"{stat.st_mtime_ns} {stat.st_size}"


def called(name: str) -> str:
    """Return how errors name a LoRA."""
    return f"LoRA {name[:200]!r}"
