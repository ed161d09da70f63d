"""From what a user wrote for a LoRA to a file on this machine.

Knows the order in which a name's meanings are tried. Knows no site's protocol (``fetch``) and nothing of what is in
the file beyond the gate's word that it may be a LoRA.

A name is, first fit wins:

1. an alias of the operator's table (``lora_aliases``);
2. an alias that ships with the built-in model, for its own LoRAs;
3. a file in the operator's LoRA folder, with or without ``.safetensors``;
4. a LoRA that ships with the built-in model;
5. a LoRA that the owner of the key uploaded;
6. a reference: ``owner/name`` of the hub, a web address, Civitai's numbers, pages and AIRs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from impasto.config import Settings
from impasto.errors import LoraError
from impasto.fetch.addresses import Policy
from impasto.fetch.allowed import Hosts, Repositories
from impasto.fetch.cache import Cache, Held
from impasto.fetch.civitai import Civitai
from impasto.fetch.client import Client
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Stop, never
from impasto.fetch.hub import Hub
from impasto.fetch.reference import HubFile, parse_reference
from impasto.fetch.sites import Sites
from impasto.lora.cog import is_archive
from impasto.lora.gate import check_header
from impasto.models.catalog import BUILTIN, BUILTIN_FOLDER
from impasto.worker.warming import read_ahead

SUFFIX: Final = ".safetensors"
ARCHIVE: Final = ".tar"  # of cog-sdxl
SHIPPED: Final = BUILTIN_FOLDER / "loras"
# LoRAs of the full-size model that documents name, and ours that draw in the same manner.
SHIPPED_ALIASES: Final[Mapping[str, str]] = {"nerijs/pixel-art-xl": "pixel-art"}
SHOWN: Final = 200  # characters of a name repeated in an error

Uploads = Callable[[str, str], Path | None]  # key id, name -> file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundLora:
    """A LoRA file on this machine.

    Attributes:
        file: The file.
        source: Where it came from, for people and logs: ``folder:``, ``shipped:``, ``upload:``, ``hub:``, ``civitai:``
            or an address, and what. Holds no secret.
        alias_of: What the name stands for, where it is an alias.
        held: Keeps the file from being deleted out of the cache for as long as this object lives.
    """

    file: Path
    source: str
    alias_of: str | None = None
    held: Held | None = field(default=None, repr=False, compare=False)


class LoraFiles:
    """The kind of file that LoRAs are, for the cache."""

    suffix = SUFFIX

    def begins(self, start: bytes) -> bool:
        """Whether a JSON header stands behind eight bytes of length, or it is an archive, as cog-sdxl's."""
        return start[8:9] == b"{" or is_archive(start)

    def check(self, path: Path) -> None:
        """Raise ``FetchFailed`` with the gate's words for what is no LoRA file, or not whole."""
        try:
            check_header(path, "loras")
        except LoraError as error:
            raise FetchFailed("content", error.problem) from None


class LoraLibrary:
    """All the LoRAs that requests may name.

    Args:
        folder: The operator's LoRA files.
        aliases: The operator's names for anything that can be named.
        shipped: Folder of the LoRAs that ship with the model in use.
        uploads: Finds what the owner of a key uploaded.
        sites: Where other LoRAs are fetched; without it nothing is.
        repositories: The only ones they are fetched from, but for those that the operator's aliases name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        aliases: Mapping[str, str] | None = None,
        shipped: Path | None = None,
        uploads: Uploads | None = None,
        sites: Sites | None = None,
        repositories: Repositories | None = None,
    ) -> None:
        self._folder = folder
        self._aliases = dict(aliases or {})
        self._shipped = shipped
        self._uploads = uploads
        self._sites = sites
        self._repositories = repositories

    @classmethod
    def of(cls, settings: Settings, uploads: Uploads | None = None) -> LoraLibrary:
        """Build the library that the settings describe."""
        shipped = SHIPPED if settings.model == BUILTIN else None
        sites = None if settings.offline else make_sites(settings)
        return cls(
            settings.lora_dir,
            aliases=settings.lora_aliases,
            shipped=shipped,
            uploads=uploads,
            sites=sites,
            repositories=Repositories.of(settings.lora_repos, Hosts.of(settings.fetch_hosts, "fetch_hosts")),
        )

    def find(self, path: str, field: str, key_id: str | None, stop: Stop = never) -> FoundLora:
        """Find what ``path`` means, and bring it here if it is elsewhere; that may take minutes.

        The file is read once, so that the engine, which parses it between two steps of other jobs, need not wait for a
        disk.

        Args:
            path: As the user wrote it.
            field: Path of the request field, for the error.
            key_id: Whose request it is.
            stop: Says when nobody waits for it any more.

        Raises:
            LoraError: Not found, not allowed, not a LoRA file, or not to be had now; the message says what to do.
        """
        name = path.strip()
        try:
            target = self._aliases.get(name) or self._aliases.get(_repository(name, whole=True))
            if target is not None:
                found = self._meant(target, key_id, stop, None)
            else:
                found = self._shipped_for(name) or self._meant(name, key_id, stop, self._repositories)
        except FetchFailed as failure:
            raise LoraError(field, f"{path[:SHOWN]!r} {failure}") from None
        read_ahead(found.file)
        return found if target is None else FoundLora(found.file, found.source, target, found.held)

    def _meant(self, name: str, key_id: str | None, stop: Stop, only: Repositories | None) -> FoundLora:
        if file := _inside(self._folder, name):
            return FoundLora(file, f"folder:{file.relative_to(self._folder.resolve()).as_posix()}")
        if self._shipped and (file := _shipped_file(self._shipped, name)):
            return FoundLora(file, f"shipped:{file.stem}")
        if self._uploads and key_id and (file := self._uploads(key_id, name)):
            return FoundLora(
                file, "upload" if "/uploads/" in name else f"upload:{name[:SHOWN]}"
            )  # an address is secret
        return self._fetched(name, stop, only)

    def _shipped_for(self, name: str) -> FoundLora | None:
        """Return the shipped LoRA that stands in for a well-known one."""
        target = SHIPPED_ALIASES.get(_repository(name))
        file = _shipped_file(self._shipped, target) if self._shipped and target else None
        return FoundLora(file, f"shipped:{file.stem}", file.stem) if file else None

    def _fetched(self, name: str, stop: Stop, only: Repositories | None) -> FoundLora:
        reference = parse_reference(name) if self._sites is None else self._sites.parse(name)
        if self._sites is None or reference is None:
            there = "" if self._sites is None else ", or give owner/name of the hub, an https address or civitai:MODEL"
            put = f"put {_plain(name)[:SHOWN]}{SUFFIX} into the server's loras folder"
            raise FetchFailed("choice", f"was not found: {put}{there}")
        if only is not None:
            only.check(reference)
        held = self._sites.fetch(reference, stop)
        log.info("LoRA %r is %s", held.note, held.path.name)
        return FoundLora(held.path, held.note, held=held)


def make_sites(settings: Settings) -> Sites:
    """Build what fetches LoRAs, as the settings say."""
    client = Client(policy_of(settings))
    cache = Cache(
        settings.cache_dir,
        client,
        LoraFiles(),
        quota=settings.cache_bytes,
        max_bytes=settings.lora_bytes,
        seconds=settings.fetch_seconds,
    )
    hub_token, civitai_token = (
        None if token is None else token.get_secret_value() for token in (settings.hf_token, settings.civitai_token)
    )
    hub = Hub(client, settings.hf_endpoint, hub_token, settings.hf_token_repos)
    return Sites(cache, hub, Civitai(client, settings.civitai_endpoint, civitai_token), settings.fetch_revalidate)


def policy_of(settings: Settings) -> Policy:
    """Say what may be dialled; the operator's own sites always may."""
    return Policy.of(
        settings.fetch_allow,
        allow_http=settings.fetch_http,
        ports=settings.fetch_ports,
        endpoints=(settings.hf_endpoint, settings.civitai_endpoint),
        only=Hosts.of(settings.fetch_hosts, "fetch_hosts"),
    )


def _plain(name: str) -> str:
    return name.removesuffix(SUFFIX)


def _repository(name: str, *, whole: bool = False) -> str:
    """Return ``owner/name`` where a name is one of the hub, in any spelling; ``whole``: not of one file or revision."""
    reference = parse_reference(name)
    if not isinstance(reference, HubFile) or (whole and (reference.file or reference.revision)):
        return ""
    return reference.repo


def _inside(folder: Path, name: str) -> Path | None:
    """Return the file that ``name`` is below ``folder``, if there is one; no name and no link leads out of it."""
    plain = _plain(name)
    if not plain.isprintable() or "\\" in plain or any(part in ("", ".", "..") for part in plain.split("/")):
        return None
    try:
        file = (folder / (plain if plain.endswith(ARCHIVE) else f"{plain}{SUFFIX}")).resolve(strict=True)
    except (OSError, ValueError):
        return None
    if not file.is_relative_to(folder.resolve()):
        log.warning("%r leads out of the LoRA folder and is not used: %s", plain, file)
        return None
    return file if file.is_file() else None


def _shipped_file(folder: Path, name: str) -> Path | None:
    """Return a shipped LoRA by its name, in which ``-``, ``_`` and spaces are one."""
    wanted = _spelling(_plain(name).removeprefix(f"{BUILTIN}/"))
    return next((file for file in sorted(folder.glob(f"*{SUFFIX}")) if _spelling(file.stem) == wanted), None)


def _spelling(name: str) -> str:
    return re.sub(r"[-_ ]+", "-", name.lower())
