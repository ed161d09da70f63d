"""A file of a hub repository: which file is meant, at which commit, and where its bytes are.

Knows the hub's protocol for this, and its words for "no". Knows no cache. The operator's token is shown for
repositories that the operator named, and for no other: whoever may name a repository could otherwise read all that
the operator may read.

Source: the hub's API (https://huggingface.co/docs/hub/api, ``/api/models/{repo}/revision/{revision}``) and its
download addresses (``/{repo}/resolve/{commit}/{file}``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import quote

from impasto.fetch.client import Client, Token
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from impasto.fetch.pairs import Beside
from impasto.fetch.reference import HubFile
from impasto.fetch.transfer import SHA256, Remote

HUB: Final = "https://huggingface.co"
USUAL_NAME: Final = "pytorch_lora_weights.safetensors"  # as diffusers' trainers save
# PEFT saves its weights without their alpha and ranks, which are in a file beside them.
PEFT_NAME: Final = "adapter_model.safetensors"
PEFT_CONFIG: Final = "adapter_config.json"
MAX_CONFIG: Final = 2**18  # bytes; with a pattern for each of SDXL's modules it has half as many
SHOWN: Final = 8  # files listed in an error
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class Hub:
    """The hub, or a mirror of it.

    Args:
        client: Fetches.
        endpoint: Base URL.
        token: Shown for the repositories of ``token_repos``.
        token_repos: ``owner/name``, with ``*`` for any.
    """

    def __init__(
        self, client: Client, endpoint: str = HUB, token: str | None = None, token_repos: Iterable[str] = ()
    ) -> None:
        self._client = client
        self.endpoint = endpoint.rstrip("/")
        self._token = Token.of(endpoint, token)
        self._token_repos = tuple(token_repos)

    def locate(self, wanted: HubFile, clock: Clock) -> Remote:
        """Ask for the file's commit and content.

        Raises:
            FetchFailed: Not there, not allowed, unclear which, or no answer.
        """
        token = self._token_for(wanted.repo)
        revision = quote(wanted.revision or "main", safe="")
        url = f"{self.endpoint}/api/models/{wanted.repo}/revision/{revision}?blobs=true"
        files, commit = _listing(self._client.json(url, clock, token))
        name = chosen(wanted, files)
        facts = files[name]
        base = f"{self.endpoint}/{wanted.repo}/resolve/{commit}"
        config = str(PurePosixPath(name).with_name(PEFT_CONFIG))
        beside = None
        if PurePosixPath(name).name == PEFT_NAME and config in files:
            beside = Beside(f"{base}/{quote(config)}", PEFT_CONFIG, PEFT_NAME, MAX_CONFIG, token)
        note = f"hub:{wanted.repo}/{name}@{commit[:12]}"
        return Remote(f"{base}/{quote(name)}", note, facts.get("sha256"), facts.get("size"), token, beside)

    def _token_for(self, repo: str) -> Token | None:
        return self._token if any(fnmatchcase(repo, pattern) for pattern in self._token_repos) else None


def chosen(wanted: HubFile, names: Iterable[str]) -> str:
    """Choose the file that is meant.

    The one that was named; else the only ``.safetensors`` file; else ``pytorch_lora_weights.safetensors``; else
    ``adapter_model.safetensors``; else the one with the repository's own name.

    Raises:
        FetchFailed: None, or several that could be meant: the message lists them.
    """
    names = list(names)
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if wanted.file is not None:
        if not wanted.file.endswith(".safetensors"):
            raise FetchFailed("content", "is no .safetensors file, and no other is loaded: name a .safetensors file")
        if wanted.file in weights:
            return wanted.file
        raise FetchFailed("choice", f"has no such file on the hub{_there_are(weights)}")
    if len(weights) == 1:
        return weights[0]
    own_name = wanted.repo.partition("/")[2].lower()
    usual = (lambda name: name == USUAL_NAME), (lambda name: name == PEFT_NAME)
    for fits in (*usual, lambda name: PurePosixPath(name).stem.lower() == own_name):
        if found := [name for name in weights if fits(name)]:
            return min(found, key=len)
    if not weights:
        pickled = any(name.endswith(_PICKLES) for name in names)
        instead = "only pickles, which could run anything" if pickled else "no .safetensors file"
        raise FetchFailed("choice", f"has {instead}: take a repository with .safetensors weights")
    raise FetchFailed("choice", f"has several files: write {wanted.repo}/FILE{_there_are(weights)}")


def _there_are(names: list[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
    return f"; there are: {', '.join(name[:100] for name in names[:SHOWN])}{more}" if names else "; it has none"


def _listing(document: Any) -> tuple[dict[str, dict[str, Any]], str]:
    """Read the repository's files, with size and hash where the hub gives them, and its commit."""
    match document:
        case {"sha": str(commit), "siblings": [*siblings]} if _COMMIT.fullmatch(commit):
            listed = (entry for entry in siblings if isinstance(entry, dict))
            return {e["rfilename"]: _facts(e) for e in listed if isinstance(e.get("rfilename"), str)}, commit
        case _:
            raise FetchFailed("broken", "got an answer from the hub that is no listing: try again later")


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    lfs = entry.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    size = entry.get("size")
    return {
        "sha256": sha256 if isinstance(sha256, str) and SHA256.fullmatch(sha256) else None,
        "size": size if isinstance(size, int) and size >= 0 else None,
    }


def explained(failure: FetchFailed, wanted: HubFile) -> FetchFailed:
    """Say what the hub's "no" means; to strangers it answers 401 for names it does not know."""
    if failure.reason != "status" or failure.status not in (401, 403, 404):
        return failure
    if failure.code == "GatedRepo":
        problem = (
            "is gated on the hub: accept its terms there, and have the server's operator set hf_token to that "
            f"account's token and allow {wanted.repo} in hf_token_repos"
        )
    elif failure.code == "RevisionNotFound":
        problem = f"has no revision {wanted.revision or 'main'!r} on the hub: check it"
    elif failure.code == "EntryNotFound":
        problem = "has no such file on the hub: check the name"
    elif failure.status == 403:
        problem = "is not open to this server on the hub: its operator's token (hf_token) may not read it"
    else:
        problem = (
            "was not found on the hub, or is private there: check owner/name; for a private one the server's "
            "operator sets hf_token and allows the repository in hf_token_repos"
        )
    return FetchFailed("status", problem, status=failure.status, code=failure.code)
