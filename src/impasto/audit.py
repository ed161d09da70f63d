"""Who did what: a file of JSON lines, one for each request that changes something or is refused for its key.

Knows the file. Knows nothing of HTTP. Nothing a client wrote as text is ever in it: no prompt, no key, no picture, no
address; LoRAs are there by a hash of their names, so that uses of one can be found by whoever knows its name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from impasto.errors import ConfigError

_MODE: Final = 0o600  # the operator's alone

log = logging.getLogger(__name__)


class AuditLog:
    """Lines at the end of a file, which several processes may share and a rotation may move away at any time.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(self._open())
        except OSError as error:
            raise ConfigError(f"audit_log: {path} cannot be written ({error.strerror})") from None

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line: the time, and what ``entry`` has. Where that fails the log says so, and the service goes on."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        try:
            self._append(json.dumps(line).encode() + b"\n")
        except OSError as error:
            log.error("the audit log cannot be written: %s", error.strerror)

    def _append(self, data: bytes) -> None:
        """Write in one go, so that lines of several processes do not mix."""
        file = self._open()
        try:
            os.write(file, data)
        finally:
            os.close(file)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _MODE)


def hashed(names: Iterable[str]) -> list[str]:
    """Return the first 16 hexadecimal digits of each name's SHA-256."""
    return [hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16] for name in names]
