"""The options that every benchmark of the engine has: which model, where, and in which numbers."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def engine_options(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with these options; the first line of ``about`` is its description."""
    made = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    made.add_argument("--model", default="builtin", help="builtin, reduced, full or a folder (default: builtin)")
    made.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "impasto-models")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto")
    return made
