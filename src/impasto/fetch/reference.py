"""What people write to name a file on a hub, on Civitai or on the web: the many spellings, as three kinds of reference.

Knows spellings. Asks no site and opens no file.

Sources: the hub's web and download addresses; Civitai's pages, downloads and AIR (https://developer.civitai.com, "AIR
- AI Resource Identifier": ``urn:air:{ecosystem}:{type}:{source}:{id}@{version}``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

HUB_HOSTS: Final = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
CIVITAI_HOSTS: Final = frozenset({"civitai.com", "www.civitai.com", "civitai.green", "civitai.red"})
LORA_TYPES: Final = frozenset({"lora", "locon", "lycoris", "dora", "loha", "lokr"})
_NAME: Final = r"(?!\.)(?:(?!\.\.)[\w.-]){1,96}"
_HUB: Final = re.compile(
    rf"(?:(?:hf|huggingface):(?://)?)?(?P<repo>{_NAME}/{_NAME})"
    r"(?P<file>/[^@?#\\]+?\.\w+)?(?:@(?P<revision>[\w./-]{1,200}))?/?",
    re.ASCII,
)
_CIVITAI: Final = re.compile(r"(?:civitai:)?(?://)?(?P<model>\d{1,12})(?:@(?P<version>\d{1,12}))?", re.ASCII | re.I)
_AIR: Final = re.compile(
    r"(?:urn:)?air:(?P<ecosystem>\w+):(?P<type>\w+):(?P<source>\w+):(?P<id>[^@:]+)(?:@(?P<version>[^:]+))?"
    r"(?::[\w.-]+)?",
    re.ASCII | re.I,
)
_MODEL_PAGE: Final = re.compile(r"/(?:api/v1/)?models/(\d{1,12})(?:/.*)?")
_VERSION_PAGE: Final = re.compile(r"/(?:api/download/models|(?:api/v1/)?model-versions)/(\d{1,12})/?")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A repository of the hub, or one file in it, at a revision."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}/{self.file}{at}" if self.file else f"{self.repo}{at}"


@dataclass(frozen=True, slots=True)
class CivitaiFile:
    """A model on Civitai, a version of it, or both; ``ecosystem`` and ``type`` where the reference claims them."""

    model: str | None = None
    version: str | None = None
    ecosystem: str = ""
    type: str = ""

    def __str__(self) -> str:
        return f"civitai:{self.model or '?'}" + (f"@{self.version}" if self.version else "")


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file at a web address."""

    url: str

    def __str__(self) -> str:
        """The address without what may be secret in it."""
        try:
            parts = urlsplit(self.url)
        except ValueError:
            return "an address that is none"
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


Reference = HubFile | CivitaiFile | WebFile


def parse_reference(
    text: str, hub_hosts: frozenset[str] = HUB_HOSTS, civitai_hosts: frozenset[str] = CIVITAI_HOSTS
) -> Reference | None:
    """Read a reference; ``None`` for text that is none.

    Args:
        text: As it was written.
        hub_hosts: Hosts, with their port if it is not the scheme's own, whose addresses are the hub's.
        civitai_hosts: The same for Civitai.
    """
    text = text.strip()
    if re.match(r"https?://", text, re.I):
        return _of_url(text, hub_hosts, civitai_hosts)
    if match := _AIR.fullmatch(text):
        return _of_air(match)
    if match := _CIVITAI.fullmatch(text):
        return CivitaiFile(match["model"], match["version"])
    match = _HUB.fullmatch(text)
    if match is None or _escapes(match["file"] or "") or ".." in (match["revision"] or ""):
        return None
    file = match["file"]
    return HubFile(match["repo"], file.lstrip("/") if file else None, match["revision"])


def _of_url(text: str, hub_hosts: frozenset[str], civitai_hosts: frozenset[str]) -> Reference:
    try:
        parts = urlsplit(text)
        host = parts.netloc.lower()
    except ValueError:
        return WebFile(text)
    if host in hub_hosts:
        return _of_hub_path(parts.path) or WebFile(text)
    if host in civitai_hosts:
        query = parse_qs(parts.query)
        return _of_civitai_path(parts.path, query.get("modelVersionId", [""])[0]) or WebFile(text)
    return WebFile(text)


def _of_hub_path(path: str) -> HubFile | None:
    """``/owner/name``, ``/owner/name/tree/rev``, ``/owner/name/{blob,resolve,raw}/rev/file``."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    repo = "/".join(parts[:2])
    if not re.fullmatch(rf"{_NAME}/{_NAME}", repo, re.ASCII) or parts[0] in ("datasets", "spaces", "api"):
        return None
    match parts[2:]:
        case []:
            return HubFile(repo)
        case ["tree", revision]:
            return HubFile(repo, None, revision)
        case ["blob" | "resolve" | "raw", revision, *file] if file and not _escapes("/" + "/".join(file)):
            return HubFile(repo, "/".join(file), revision)
        case _:
            return None


def _of_civitai_path(path: str, version: str) -> CivitaiFile | None:
    version = version if re.fullmatch(r"\d{1,12}", version, re.ASCII) else ""
    if match := _VERSION_PAGE.fullmatch(path):
        return CivitaiFile(None, match[1])
    if match := _MODEL_PAGE.fullmatch(path):
        return CivitaiFile(match[1], version or None)
    return None


def _of_air(match: re.Match[str]) -> Reference | None:
    model, version, source = match["id"], match["version"], match["source"].lower()
    if source == "huggingface":
        return parse_reference(f"{model}@{version}" if version else model)
    if source != "civitai" or not model.isdigit() or not (version or "0").isdigit():
        return None
    return CivitaiFile(model, version, match["ecosystem"].lower(), match["type"].lower())


def _escapes(path: str) -> bool:
    """Whether a path has segments that lead elsewhere, or characters that no file name needs."""
    segments = path.lstrip("/").split("/")
    return bool(path) and (any(part in ("", ".", "..") for part in segments) or not path.isprintable())
