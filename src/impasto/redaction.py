"""Taking secrets out of text that is about to be logged.

Knows what keys, tokens and addresses that carry them look like. Knows nothing of who logs.
"""

from __future__ import annotations

import logging
import re
from typing import Final

HIDDEN: Final = "[redacted]"
_SECRET_NAMES: Final = (
    r"token|key|api_?key|access_token|secret|sig|signature|password|x-amz-[\w-]+|x-goog-[\w-]+|policy|credential"
)
_PATTERNS: Final = (
    (re.compile(r"\b(bearer|basic)\s+[^\s'\",;)\]]+", re.I), rf"\1 {HIDDEN}"),
    # userinfo in an address, a database's among them
    (re.compile(r"(?<=://)[^\s/@'\"]+@"), f"{HIDDEN}@"),
    (re.compile(rf"([?&;](?:[\w-]*(?:{_SECRET_NAMES}))=)[^\s&#'\"]+", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"\b(hf_|whsec_|sk-|xox[a-z]-|gh[a-z]_)[\w=+/-]{8,}"), rf"\1{HIDDEN}"),
    # A key of ours as it stands: 64 hexadecimal digits that are neither a file's name nor marked as a hash.
    (re.compile(r"(?<![\w:@])[0-9a-f]{64}(?![\w.])"), HIDDEN),
)


def redacted(text: str) -> str:
    """Return ``text`` with whatever looks like a secret replaced."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


class RedactingFormatter(logging.Formatter):
    """Formats a record as always, its trace included, and takes the secrets out of the result."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or lines, to be written."""
        return redacted(super().format(record))
