"""How the processes of the service log: to standard error, one line a record. Knows nothing of what is logged."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
NOISY = ("alembic", "httpx", "urllib3")  # libraries whose "info" is of no use to an operator


def set_up_logging(level: str) -> None:
    """Log everything from ``level`` (``debug``, ``info``, ``warning``, ``error``) on."""
    logging.basicConfig(level=level.upper(), format=FORMAT, stream=sys.stderr)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
