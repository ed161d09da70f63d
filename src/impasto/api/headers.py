"""Headers that every answer has unless its route says otherwise. Knows nothing of routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# JSON and pictures: shown, and never run, framed or taken for another type. The page at ``/`` and the files have
# policies of their own.
SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
