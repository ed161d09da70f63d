"""The files of a checker that does not come with us: in a folder here, or from the hub.

Knows names, folders and which files are wanted. Loads nothing; imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from impasto.errors import ConfigError, ModelError
from impasto.models.catalog import HUB_ID

WEIGHTS: Final = "model.safetensors"  # pickles are not loaded
CONFIG: Final = "config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
FILES: Final = (CONFIG, PREPROCESSOR, WEIGHTS)

Fetch = Callable[[str, str | None, str | None], Path]  # repository, revision, file


@dataclass(frozen=True, slots=True)
class Source:
    """A checker's folder on disk, and a text that changes when its content may have."""

    folder: Path
    version: str


def find_weights(name: str, fetch: Fetch | None = None) -> Source:
    """Find the folder of a checker, with every file in it.

    Args:
        name: A folder, or ``owner/name`` of the hub, with ``@revision`` if wanted. A folder that exists wins.
        fetch: Brings one file of a repository to disk; by default ``hub.fetch_model``.

    Raises:
        ConfigError: There is no such folder or repository, or a file is missing in it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(name, folder, f"{name} {(folder / WEIGHTS).stat().st_mtime_ns}" if _whole(folder) else name)
    match = HUB_ID.fullmatch(name)
    if match is None or match["file"]:
        raise ConfigError(f"safety_checker: {name!r} is neither a folder here nor a hub repository, as owner/name")
    try:
        folder = _fetched(match["repo"], match["revision"], fetch)
    except ModelError as error:
        raise ConfigError(f"safety_checker: {error}") from error
    return _checked(name, folder, f"{match['repo']}@{folder.name}")


def _whole(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def _checked(name: str, folder: Path, version: str) -> Source:
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise ConfigError(f"safety_checker: {name!r} has no {', '.join(missing)}")
    return Source(folder, version)


def _fetched(repo: str, revision: str | None, fetch: Fetch | None) -> Path:
    """Bring the files of one commit to disk; the folder they lie in is called by the commit."""
    if fetch is None:
        from impasto.models.hub import fetch_model  # imports HTTP libraries, which few starts need

        fetch = fetch_model
    folder = fetch(repo, revision, CONFIG).parent
    for file in (PREPROCESSOR, WEIGHTS):
        fetch(repo, folder.name, file)
    return folder
