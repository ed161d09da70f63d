"""Files by reference: asks the site that a reference belongs to, and keeps what it gives in one cache.

Knows which site answers for which reference, and for how long an answer holds. Knows no protocol.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from impasto.fetch.cache import Cache, Held, Locate
from impasto.fetch.civitai import Civitai
from impasto.fetch.civitai import explained as civitai_explained
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Stop, never
from impasto.fetch.hub import Hub
from impasto.fetch.hub import explained as hub_explained
from impasto.fetch.reference import (
    CIVITAI_HOSTS,
    HUB_HOSTS,
    CivitaiFile,
    HubFile,
    Reference,
    WebFile,
    parse_reference,
)
from impasto.fetch.transfer import Remote

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Sites:
    """The places that files come from.

    Attributes:
        cache: Where they are kept.
        hub: The hub, or a mirror.
        civitai: Civitai, or a mirror.
        revalidate: Seconds for which an answer that may change is not asked for again.
    """

    cache: Cache
    hub: Hub
    civitai: Civitai
    revalidate: float = 300.0

    def parse(self, text: str) -> Reference | None:
        """Read a reference, in which the mirrors' own addresses count as those of the sites."""
        hub, civitai = urlsplit(self.hub.endpoint).netloc, urlsplit(self.civitai.endpoint).netloc
        return parse_reference(text, HUB_HOSTS | {hub.lower()}, CIVITAI_HOSTS | {civitai.lower()})

    def fetch(self, wanted: Reference, stop: Stop = never) -> Held:
        """Return the file on disk, fetched unless it is there.

        Raises:
            FetchFailed: The message is the rest of a sentence about the reference.
        """
        match wanted:
            case HubFile():
                address = f"{self.hub.endpoint} {wanted}"
                pinned = wanted.revision is not None and _COMMIT.fullmatch(wanted.revision) is not None
                try:
                    return self._get(address, lambda clock: self.hub.locate(wanted, clock), pinned, stop)
                except FetchFailed as failure:
                    raise hub_explained(failure, wanted) from None
            case CivitaiFile():
                address = f"{self.civitai.endpoint} {wanted}"
                pinned = wanted.version is not None
                try:
                    return self._get(address, lambda clock: self.civitai.locate(wanted, clock), pinned, stop)
                except FetchFailed as failure:
                    raise civitai_explained(failure) from None
            case WebFile(url):
                return self._get(url, lambda clock: Remote(url, str(wanted)), False, stop)

    def _get(self, address: str, locate: Locate, pinned: bool, stop: Stop) -> Held:
        """Fetch; a commit or a version never changes, all else may."""
        return self.cache.get(address, locate, fresh=math.inf if pinned else self.revalidate, stop=stop)
