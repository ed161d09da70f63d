"""A hub repository's model on disk: what we load of it and nothing else, at one commit, kept in the hub's own cache.

Knows huggingface_hub, and is the only file that does. Knows nothing of what the files hold beyond ``model_index.json``;
imports no torch.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from impasto.errors import ModelError
from impasto.models.catalog import PARTS, read_index

INDEX = "model_index.json"
HALF = "fp16"  # the variant that half-precision weights are published under
_WITHOUT_WEIGHTS = {"tokenizer", "tokenizer_2", "scheduler"}
_STEM = r"(?:diffusion_pytorch_model|model)"
_WEIGHTS = re.compile(
    rf"{_STEM}(?:\.(?P<a>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<b>\w+))?\.safetensors"
    rf"|{_STEM}\.safetensors\.index(?:\.(?P<c>\w+))?\.json"
)
_TEXT = re.compile(r"\w[\w.-]*\.(json|txt)")
# What can go wrong: the bases are OSError and the errors of the HTTP library that the installed hub client uses.
_FAILURES: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, CachedRepoTreeNotFoundError, HFValidationError)

log = logging.getLogger(__name__)


class TerminalBar(tqdm):
    """The hub's progress bar, on terminals alone; ``HF_HUB_DISABLE_PROGRESS_BARS=1`` turns it off there too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"disable": None} | options)  # type: ignore[no-untyped-call]


def fetch_model(
    repo_id: str,
    revision: str | None = None,
    file: str | None = None,
    *,
    full: bool = False,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> Path:
    """Bring a model of the hub to disk, unless it is there, and return its folder or file.

    With the hub away, what the cache holds is used.

    Args:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit; the default branch if absent.
        file: One ``.safetensors`` file of the repository; absent: its diffusers folder.
        full: Take full-precision weights where the repository also has half-precision ones.
        endpoint: URL of the hub; cache_dir: where its files are kept; token: who asks. By default what
            ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` say.

    Raises:
        ModelError: Not there, not allowed, not reachable, no space, or nothing that we load; the message says which.
    """
    access: dict[str, Any] = {"endpoint": endpoint, "cache_dir": cache_dir, "token": token, "tqdm_class": TerminalBar}
    with _errors_told(repo_id, revision, file):
        if file is not None:
            return _fetch_file(repo_id, revision, file, access)
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[INDEX], **access))
        return _fetch_folder(repo_id, folder, full, access)


def fetch_adapter(repo_id: str, revision: str | None, files: Iterable[str]) -> Path:
    """Bring the files of these names of a small repository to disk, unless they are there, and return its folder.

    Raises:
        ModelError: As ``fetch_model``.
    """
    with _errors_told(repo_id, revision, None):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files), tqdm_class=TerminalBar))


def cached_model(repo_id: str, revision: str | None = None, file: str | None = None) -> Path:
    """Return where a model is that ``fetch_model`` has brought, without asking anybody.

    Raises:
        ModelError: It is not here.
    """
    with _errors_told(repo_id, revision, file):
        if file is not None:
            return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[INDEX], local_files_only=True))


def _fetch_file(repo_id: str, revision: str | None, file: str, access: dict[str, Any]) -> Path:
    found = hf_hub_download(repo_id, file, revision=revision, dry_run=True, **access)
    if found.will_download:
        _announce(repo_id, found.commit_hash, [found.file_size or 0], access["cache_dir"])
    # By its branch, not its commit: only so is the branch's name kept, by which the file is found when offline.
    return Path(hf_hub_download(repo_id, file, revision=revision, **access))


def _fetch_folder(repo_id: str, folder: Path, full: bool, access: dict[str, Any]) -> Path:
    """Complete a snapshot folder, whose name is its commit."""
    sizes = {f.path: f.size for f in get_cached_repo_tree(repo_id, revision=folder.name, cache_dir=access["cache_dir"])}
    if INDEX not in sizes:
        raise ModelError(
            f"model {repo_id!r} has no {INDEX}, so it is no diffusers model{_single_files(repo_id, sizes)}"
        )
    parts = [part for part in PARTS if read_index(repo_id, folder).get(part, [None])[0] is not None]
    wanted = wanted_files(sizes, parts, full=full)
    bare = [part for part in parts if part not in _WITHOUT_WEIGHTS and not _has_weights(wanted, part)]
    if bare:
        raise ModelError(
            f"model {repo_id!r} has no .safetensors weights of {', '.join(bare)}, and pickles are not loaded; "
            f"take another repository or revision{_single_files(repo_id, sizes)}"
        )
    absent = [sizes[path] for path in wanted if not (folder / path).exists()]
    if absent:
        _announce(repo_id, folder.name, absent, access["cache_dir"])
    return Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=[INDEX, *wanted], **access))


def wanted_files(names: Iterable[str], parts: Iterable[str], *, full: bool) -> list[str]:
    """Choose of a repository's files those that loading needs: configurations, tokenizers and one set of weights.

    Of each network the half-precision weights are taken where there are some, or with ``full`` where there are no
    others. Never pickles, other frameworks' weights, or training leftovers.
    """
    wanted = []
    for part in parts:
        own = [name for name in names if name.startswith(part + "/") and name.count("/") == 1]
        weights = {name: _variant(name) for name in own if _WEIGHTS.fullmatch(name.partition("/")[2])}
        preferred = (None, HALF) if full else (HALF, None)
        variant = next((v for v in preferred if _has_weights([n for n in weights if weights[n] == v], part)), None)
        wanted += [name for name in weights if weights[name] == variant]
        wanted += [name for name in own if name not in weights and _TEXT.fullmatch(name.partition("/")[2])]
    return wanted


def _variant(name: str) -> str | None:
    match = _WEIGHTS.fullmatch(name.partition("/")[2])
    return next(filter(None, match.groupdict().values()), None) if match else None


def _has_weights(names: Iterable[str], part: str) -> bool:
    return any(name.startswith(part + "/") and name.endswith(".safetensors") for name in names)


def _single_files(repo_id: str, names: Iterable[str]) -> str:
    files = sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))
    return f"; it has single files, such as {repo_id}/{files[0]}" if files else ""


def _announce(repo_id: str, commit: str, sizes: list[int], cache_dir: Path | None) -> None:
    """Say what is fetched, and refuse what the disk has no room for."""
    total, gigabyte = sum(sizes), 1e9
    log.info("fetching %d files of %s at %s, %.2f GB", len(sizes), repo_id, commit[:12], total / gigabyte)
    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    free = shutil.disk_usage(next(at for at in (folder, *folder.absolute().parents) if at.exists())).free
    if total > free:
        raise ModelError(
            f"model {repo_id!r} needs {total / gigabyte:.1f} GB, and the disk of the hub's cache has "
            f"{free / gigabyte:.1f} GB free; make room, or set HF_HOME to another disk"
        )


@contextmanager
def _errors_told(repo_id: str, revision: str | None, file: str | None) -> Iterator[None]:
    """Turn what goes wrong with the hub into one sentence that says what to do."""
    try:
        yield
    except _FAILURES as error:
        raise ModelError(f"model {repo_id!r} {_told(error, revision, file)}") from error


def _told(error: Exception, revision: str | None, file: str | None) -> str:
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    if _is_refusal(cause):
        return "is gated or private: accept its terms on its page, and set HF_TOKEN to a token that may read it"
    match error:
        case HFValidationError():
            return "is no repository name of the hub: give owner/name"
        case RevisionNotFoundError():
            return f"has no revision {revision!r} on the hub"
        case RepositoryNotFoundError():
            return "is neither a path here nor on the hub, or it is private: check the name, or set HF_TOKEN"
        case IncompleteSnapshotError():
            return "is only partly here, and the hub cannot be reached: fetch the rest with a network"
        case LocalEntryNotFoundError() | CachedRepoTreeNotFoundError():
            return f"is not whole here, and the hub cannot be reached ({type(cause).__name__}): check the network"
        case EntryNotFoundError():
            return f"has no file {file!r} on the hub"
        case OSError(errno=errno.ENOSPC):
            return "does not fit on the disk of the hub's cache; make room, or set HF_HOME to another disk"
        case _:
            return f"could not be fetched whole ({type(error).__name__}); try again, what is whole is kept"


def _is_refusal(error: BaseException | None) -> bool:
    """Whether the hub knows the repository and says no; an unknown name is answered by 401 too."""
    if isinstance(error, GatedRepoError):
        return True
    return (
        isinstance(error, HfHubHTTPError)
        and not isinstance(error, RepositoryNotFoundError)
        and error.response.status_code in (401, 403)
    )
