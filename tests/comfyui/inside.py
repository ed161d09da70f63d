"""Runs a script or a test inside ComfyUI, without its server: its folder on the path, on the CPU, in float32.

Knows how ComfyUI is imported. ``IMPASTO_COMFYUI`` names its folder; its requirements must be installed.
"""

import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import tests.random_sdxl  # noqa: F401  (first: ComfyUI has a package named tests as well, and this one is meant)

SETTING = "IMPASTO_COMFYUI"


def comfyui_folder() -> Path | None:
    """The folder that ``IMPASTO_COMFYUI`` names, if it does."""
    return Path(os.environ[SETTING]) if os.environ.get(SETTING) else None


def enter_comfyui() -> ModuleType:
    """Import ComfyUI and return ``comfy.sd``; the classes of ``small_sdxl`` are known to it from then on."""
    folder = comfyui_folder()
    if folder is None or not (folder / "comfy" / "sd.py").is_file():
        raise SystemExit(f"set {SETTING} to a folder of ComfyUI, whose requirements are installed")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from comfy.cli_args import args

        args.cpu = True
        import comfy.sd

        import tests.comfyui.small_sdxl  # noqa: F401

    return comfy.sd
