"""What an operator does to a database as a whole: check it, and copy it while it is in use.

Knows what must always be true of the tables. Knows nothing of who asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DatabaseError

from impasto.errors import ConfigError
from impasto.jobs.database import MIGRATIONS, reading
from impasto.jobs.queries import queries

SHOWN: Final = 10  # rows named for each rule
# Statements that find what must not be, and what is wrong then.
RULES: Final = {
    "ended_other_than_once": "predictions whose end is not on record exactly once",
    "held_without_lease": "predictions that run without a lease, or have one and do not run",
    "delivered_other_than_once": "completed predictions that not exactly one attempt delivered",
    "attempts_left_open": "attempts without an end at predictions that no worker has",
    "times_out_of_order": "ended predictions without a time of their end, or others with one",
    "ended_untold": "ended predictions whose webhook was never written",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that must not be."""

    what: str
    ids: tuple[str, ...] = ()  # of the first predictions concerned


def newest_revision() -> str:
    """Return the revision that this version of the program needs."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return str(ScriptDirectory.from_config(config).get_current_head())


def check(engine: Engine) -> list[Problem]:
    """Look for damage: in the file itself (SQLite), in the tables' form, and in what the rows say together.

    All from one moment, so it may run while the service does.

    Raises:
        Unavailable: The database cannot answer.
    """
    try:
        return _problems(engine)
    except DatabaseError as error:  # the file is too damaged to be asked
        return [Problem(f"the file is damaged: {error.orig}")]


def _problems(engine: Engine) -> list[Problem]:
    with reading(engine) as db:
        if damage := list(_damage(db)):
            return damage
        if outdated := _outdated(db):
            return [Problem(outdated)]
        statements = queries(engine.dialect.name)
        found = ((what, db.execute(statements[rule], {"limit": SHOWN}).scalars().all()) for rule, what in RULES.items())
        return [Problem(what, tuple(ids)) for what, ids in found if ids]


def require_file(engine: Engine) -> None:
    """Do nothing if a SQLite database's file is there: opening it would make one.

    Raises:
        ConfigError: It is not.
    """
    if engine.dialect.name == "sqlite" and not Path(engine.url.database or "").is_file():
        raise ConfigError(f"there is no database {engine.url.database}; give --data-dir or --database-url")


def require_newest(engine: Engine) -> None:
    """Do nothing if the tables are there and in this version's form; make and change nothing.

    Raises:
        ConfigError: They are not.
        Unavailable: The database cannot answer.
    """
    require_file(engine)
    with reading(engine) as db:
        if outdated := _outdated(db):
            raise ConfigError(outdated)


def _outdated(db: Connection) -> str:
    """Say what is wrong with the tables' form, if anything."""
    if "alembic_version" not in inspect(db).get_table_names():
        return "there are no tables; run: impasto db upgrade"
    there, needed = db.execute(queries(db.dialect.name)["revision"]).scalar(), newest_revision()
    return "" if there == needed else f"the tables are at revision {there}, not {needed}; run: impasto db upgrade"


def _damage(db: Connection) -> Iterator[Problem]:
    """Ask SQLite about its file; PostgreSQL checks its pages as it reads them."""
    if db.dialect.name != "sqlite":
        return
    told = db.execute(text("pragma integrity_check")).scalars().all()
    if told != ["ok"]:
        yield Problem(f"the file is damaged: {'; '.join(told[:SHOWN])}")
    loose = db.execute(text("pragma foreign_key_check")).all()
    if loose:
        yield Problem(f"{len(loose)} rows refer to rows that are not there")


def backup(engine: Engine, file: Path) -> None:
    """Copy a SQLite database into a new file, from one moment, while the service runs.

    Raises:
        ConfigError: The file is there already or cannot be written, or the database is PostgreSQL.
        Unavailable: The database cannot answer.
    """
    if engine.dialect.name != "sqlite":
        address = engine.url._replace(drivername="postgresql", password=None).render_as_string()
        raise ConfigError(f"PostgreSQL has a tool of its own: pg_dump --format=custom --file={file} {address}")
    if file.exists():
        raise ConfigError(f"{file} is there already; name a new file")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {file.absolute().parent}; make it first")
    with reading(engine) as db:  # VACUUM takes no transaction around it
        db.rollback()
        db.connection.driver_connection.execute("VACUUM INTO ?", (str(file),))  # type: ignore[union-attr]
