"""The command line's ``impasto db …``: tables brought up to date, checked, copied.

Knows options and words. Holds no logic of databases (``jobs/database.py``, ``jobs/upkeep.py``).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sqlalchemy import Engine

db_app = typer.Typer(help="The job store: upgrade, check, backup.", no_args_is_help=True, rich_markup_mode="markdown")

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the service. (IMPASTO_DATA_DIR)")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database-url", help="Its job store, if elsewhere. (IMPASTO_DATABASE_URL)")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings. (IMPASTO_CONFIG)")]


@db_app.command("upgrade")
def upgrade(data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Bring the tables to this version's form. ``serve`` and ``worker`` do the same when they start.

    With many machines, run it once before the new version starts anywhere.
    """
    from impasto.jobs import database
    from impasto.jobs.upkeep import newest_revision

    database.upgrade(_engine(data_dir, database_url, config))
    print(f"the tables are at revision {newest_revision()}", file=sys.stderr)


@db_app.command("check")
def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Look for damage: in the file, in the tables' form, and in what the rows say together. Changes nothing.

    May run while the service does. The exit status is 0 if all is well, 1 if something is wrong.
    """
    from impasto.jobs import upkeep

    engine = _engine(data_dir, database_url, config)
    upkeep.require_file(engine)
    problems = upkeep.check(engine)
    if as_json:
        print(json.dumps([asdict(problem) for problem in problems]))
    for problem in () if as_json else problems:
        print(f"{problem.what}{': ' if problem.ids else ''}{', '.join(problem.ids)}")
    if not problems and not as_json:
        print("all is well")
    raise typer.Exit(1 if problems else 0)


@db_app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(help="A new file.", show_default=False)],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Copy the SQLite database to a new file while the service runs. Copy the pictures' folder after that.

    For PostgreSQL it says which command does the same.
    """
    from impasto.jobs import upkeep

    engine = _engine(data_dir, database_url, config)
    upkeep.require_file(engine)
    upkeep.backup(engine, file)
    print(f"{file}: {file.stat().st_size} bytes", file=sys.stderr)


def _engine(data_dir: Path | None, database_url: str | None, config: Path | None) -> Engine:
    from impasto.config import Settings
    from impasto.jobs.database import open_database

    given = {"data_dir": data_dir, "database_url": database_url}
    return open_database(Settings.load(config, {name: value for name, value in given.items() if value}).database)
