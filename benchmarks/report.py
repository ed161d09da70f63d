"""How results leave: a table for people, one line of JSON, and the same JSON in a file. Knows no benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

RESULTS: Final = Path(__file__).parent / "results"


def publish(table: Table, result: dict[str, Any], out: Path) -> None:
    """Print a table and one line of JSON, and write ``out``."""
    Console(file=sys.stdout, width=120).print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
