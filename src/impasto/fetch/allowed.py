"""The operator's lists of what may be fetched at all: hosts, and repositories of LoRAs.

Knows patterns. Dials nothing. These lists only narrow: what they name must still be public or allowed (``addresses``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import urlsplit

from impasto.errors import ConfigError
from impasto.fetch.failure import FetchFailed
from impasto.fetch.reference import CivitaiFile, HubFile, Reference, WebFile

_HOST: Final = re.compile(r"(\*\.)?[\w-]+(\.[\w-]+)*\.?|[0-9.]+|[0-9a-fA-F:]*:[0-9a-fA-F:]*")
_REPO: Final = re.compile(r"[\w.*-]+/[\w.*-]+|civitai:(\d+|\*)|\*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Hosts:
    """The only hosts that may be dialled: names, and ``*.example`` for every name below ``example``."""

    patterns: tuple[str, ...]

    @classmethod
    def of(cls, entries: Sequence[str] | None, setting: str) -> Hosts | None:
        """Read an operator's list; ``None`` is no list, so that every host may be.

        Raises:
            ConfigError: An entry is no host; the message names ``setting``.
        """
        for entry in entries or ():
            if not _HOST.fullmatch(entry):
                raise ConfigError(f"settings: {setting}: {entry!r} is no host: write models.example or *.example")
        return None if entries is None else cls(tuple(entry.lower().rstrip(".") for entry in entries))

    def has(self, host: str) -> bool:
        """Whether a host is on the list."""
        return any(fnmatchcase(host.lower().rstrip("."), pattern) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Repositories:
    """The only repositories that LoRAs may come from: ``owner/name``, ``owner/*``, ``civitai:MODEL``, ``civitai:*``.

    An address of another kind, the hub's own pages among them, must be of one of ``hosts``.
    """

    patterns: tuple[str, ...]
    hosts: Hosts | None = None

    @classmethod
    def of(cls, entries: Sequence[str] | None, hosts: Hosts | None = None) -> Repositories | None:
        """Read an operator's list; ``None`` is no list.

        Raises:
            ConfigError: An entry is no repository.
        """
        for entry in entries or ():
            if not _REPO.fullmatch(entry):
                problem = "write owner/name, owner/*, civitai:MODEL or civitai:*"
                raise ConfigError(f"settings: lora_repos: {entry!r} is no repository: {problem}")
        return None if entries is None else cls(tuple(entry.lower() for entry in entries), hosts)

    def check(self, wanted: Reference) -> None:
        """Pass what is on the list.

        Raises:
            FetchFailed: It is not; a version of Civitai alone does not say whose it is.
        """
        match wanted:
            case HubFile():
                name = wanted.repo.lower()
            case CivitaiFile():
                name = f"civitai:{wanted.model or '?'}"
            case WebFile():
                name = ""
                if self.hosts is not None and self.hosts.has(urlsplit(wanted.url).hostname or ""):
                    return
        if not name or not any(fnmatchcase(name, pattern) for pattern in self.patterns):
            model = "give civitai:MODEL@VERSION, or " if name == "civitai:?" else ""
            raise FetchFailed("address", f"is not on this server's list of repositories: {model}ask its operator")
