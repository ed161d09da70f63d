"""Kill everything at random while clients submit, then check that no accepted job was lost or done twice.

    python -m scripts.chaos --seconds 60 --database postgresql --seed 7

Knows how to ask for runs and how to show what they came to; ``tests/chaos/`` does them. The seed fixes what is drawn,
not what the machine makes of it: two runs with one seed are alike, not the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.run import Chaos, Result

DATABASES = ("sqlite", "postgresql")
SHOWN_PROBLEMS = 20


def table(results: list[Result]) -> Table:
    """The results for people, a column each."""
    counted = [
        {
            "accepted": result.accepted,
            "lost": result.lost,
            "double": result.double,
            **{f"ended {state}": count for state, count in sorted(result.states.items())},
            "attempts": result.attempts,
            "webhooks taken": result.webhooks,
            "uploads": result.uploads,
            **dict(sorted(result.done_to.items())),
            **{f"not answered: {why}": count for why, count in sorted(result.refused.items())},
            "seconds to settle": result.settled_after,
            "promises broken": len(result.wrong),
        }
        for result in results
    ]
    shown = Table("", *(f"{result.database}, {result.seconds:g} s, seed {result.seed}" for result in results))
    for name in dict.fromkeys(name for counts in counted for name in counts):
        shown.add_row(name, *(str(counts.get(name, 0)) for counts in counted))
    return shown


def main() -> int:
    """Run, print and judge; the exit status is 1 if a promise was broken."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seconds", type=float, default=60, help="of killing, for each database")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--database", choices=[*DATABASES, "both"], default="both")
    asked.add_argument("--json", type=Path, help="write the results here, too")
    chosen = asked.parse_args()
    console, results = Console(stderr=True), []
    for database in DATABASES if chosen.database == "both" else [chosen.database]:
        folder = Path(tempfile.mkdtemp(prefix="impasto-chaos-"))
        result = Chaos(database, chosen.seed, folder).run(chosen.seconds, console.print)
        results.append(result)
        for line in result.wrong[:SHOWN_PROBLEMS]:
            console.print(f"[red]{line}[/]")
        if result.wrong:
            console.print(f"logs and files stay in {folder}")
        else:
            shutil.rmtree(folder)
    console.print(table(results))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
