"""Names that the worker's parts share: models, processes, exit statuses. Imports nothing heavy."""

from __future__ import annotations

import secrets
import socket

FAKE_MODEL = "fake"  # the model name that asks for the test-pattern backend
EXIT_CONFIG = 78  # sysexits' EX_CONFIG: starting again would not help
EXIT_STALLED = 75  # sysexits' EX_TEMPFAIL: the backend hung; starting again may help


def new_name() -> str:
    """Return a worker name that no other worker has, and that tells an operator where it runs."""
    return f"{socket.gethostname()}-{secrets.token_hex(6)}"
