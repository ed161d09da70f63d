"""The pack into a ComfyUI's ``custom_nodes`` and out again.

Knows what a ComfyUI folder looks like and which files the pack is. Imports nothing of ComfyUI and nothing heavy.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from impasto.errors import ConfigError

NAME: Final = "impasto"  # of the folder in custom_nodes
LEAST: Final = (0, 3, 64)  # what the nodes are tested with, and the first whose interface they use
_HERE: Final = Path(__file__).parent
_PACK: Final = _HERE / "pack"
_EXAMPLES: Final = _HERE / "example_workflows"
_SIGNS: Final = ("main.py", "nodes.py", "folder_paths.py", "comfy")  # what only ComfyUI's own folder has together
_PYTHONS: Final = (  # where the ways to install ComfyUI put its Python, from its folder
    "venv/bin/python", ".venv/bin/python", "venv/Scripts/python.exe", ".venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)  # fmt: skip
_IMPORT_SECONDS: Final = 120


def install(comfyui: Path, custom_nodes: Path | None = None) -> Path:
    """Put the pack into ComfyUI, anew if it is there already; return its folder.

    Args:
        comfyui: ComfyUI's folder.
        custom_nodes: Where its nodes are, if not in ``custom_nodes`` there (``--base-directory``).

    Raises:
        ConfigError: That is no ComfyUI, or too old a one, or something else has the pack's place.
    """
    check_comfyui(comfyui)
    folder = _place(comfyui, custom_nodes)
    write_pack(folder)
    return folder


def uninstall(comfyui: Path, custom_nodes: Path | None = None) -> Path | None:
    """Take the pack out; return the folder that was deleted, or ``None`` if there was none.

    Raises:
        ConfigError: What is in its place is not ours.
    """
    folder = _place(comfyui, custom_nodes)
    if not folder.exists():
        return None
    _check_ours(folder)
    shutil.rmtree(folder)
    return folder


def write_pack(folder: Path) -> None:
    """Write the pack as it stands in ``custom_nodes`` and in the registry: shim, settings page, example workflows.

    Raises:
        ConfigError: The folder holds something that is not ours.
    """
    if folder.exists():
        _check_ours(folder)
        shutil.rmtree(folder)
    shutil.copytree(_PACK, folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(_EXAMPLES, folder / _EXAMPLES.name, ignore=shutil.ignore_patterns("__pycache__"))


def check_comfyui(folder: Path) -> str:
    """Return the version of the ComfyUI in a folder.

    Raises:
        ConfigError: There is none, or it is too old.
    """
    missing = [sign for sign in _SIGNS if not (folder / sign).exists()]
    if missing:
        raise ConfigError(f"{folder} is not ComfyUI's folder, which has a {missing[0]}; give the one with its main.py")
    version = _version(folder)
    if version is None:
        raise ConfigError(f"{folder} does not say which version it is (comfyui_version.py); update ComfyUI")
    if tuple(int(part) for part in version.split(".")) < LEAST:
        least = ".".join(str(part) for part in LEAST)
        raise ConfigError(f"{folder} is ComfyUI {version}; the nodes need {least} or later: update it (git pull)")
    return version


def pythons_without_us(comfyui: Path) -> Iterator[Path]:
    """Yield each Python found in a ComfyUI's folder that cannot import our nodes."""
    for name in _PYTHONS:
        python = comfyui / name
        if python.exists() and not _imports(python):
            yield python


def _imports(python: Path) -> bool:
    try:
        check = [str(python), "-c", "import impasto.comfyui"]
        return subprocess.run(check, capture_output=True, check=False, timeout=_IMPORT_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _version(folder: Path) -> str | None:
    try:
        match = re.search(r'__version__\s*=\s*"(\d+\.\d+\.\d+)', (folder / "comfyui_version.py").read_text())
    except OSError:
        return None
    return match[1] if match else None


def _place(comfyui: Path, custom_nodes: Path | None) -> Path:
    nodes = custom_nodes or comfyui / "custom_nodes"
    if not nodes.is_dir():
        raise ConfigError(f"{nodes} is not there; give the folder of ComfyUI's custom nodes with --custom-nodes")
    return nodes / NAME


def _check_ours(folder: Path) -> None:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["name"]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError):
        project = None
    if project != NAME or not (folder / "__init__.py").is_file():
        raise ConfigError(f"{folder} is there and is not our pack; move it away first")
