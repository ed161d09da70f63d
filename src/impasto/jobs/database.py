"""Opens the database so that what was committed stays committed, and brings its tables up to date.

Knows SQLite's and PostgreSQL's switches, transactions and migrations. Knows nothing of what the tables mean.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pysqlite3.dbapi2 as sqlite
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import PoolProxiedConnection

from impasto.errors import ConfigError, Unavailable
from impasto.jobs.queries import queries

MIGRATIONS: Final = Path(__file__).parent / "migrations"
BUSY_SECONDS: Final = 15.0  # how long a writer waits for SQLite's one write lock
SAFE_SQLITE: Final = (3, 51, 3)  # older ones can corrupt a WAL file that several processes write (walresetbug)
UPGRADE_LOCK: Final = 0x1A9A570  # PostgreSQL advisory lock: one process migrates, the others wait
CONNECT_SECONDS: Final = 5  # in which PostgreSQL must take a connection; also ``?connect_timeout=`` in its URL
AWAY_SECONDS: Final = 1.0  # between looks for a database that is not there yet
# Kept open once they were needed: those beyond ``pool_size`` would be opened and closed again for each poll of a busy
# service, at several times what the poll costs.
_POOL: Final[dict[str, Any]] = {"pool_size": 32, "max_overflow": 0}
_BEGIN: Final = "sqlite_begin"  # execution option that chooses how a transaction starts

log = logging.getLogger(__name__)


def open_database(url: str) -> Engine:
    """Make an engine for a ``sqlite:///file`` or ``postgresql://…`` URL; SQLite's folder is made if missing.

    Raises:
        ConfigError: The URL is not one of these two, names no file, or this SQLite is unsafe.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError("database_url is not a URL; use sqlite:////path/impasto.db or postgresql://…") from None
    match parsed.get_backend_name():
        case "sqlite":
            return _open_sqlite(parsed)
        case "postgresql":
            return _open_postgresql(parsed)
        case name:
            raise ConfigError(f"database_url has an unknown kind {name!r}; use sqlite:////path or postgresql://…")


def _open_postgresql(url: URL) -> Engine:
    # By default a host that says nothing is waited for without end, and its callers hold threads meanwhile.
    timeout = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_SECONDS}
    url = url.set(drivername="postgresql+psycopg")
    try:
        return create_engine(url, pool_pre_ping=True, connect_args=timeout, **_POOL)
    except ModuleNotFoundError:
        raise ConfigError("database_url is PostgreSQL's, its driver is missing; install impasto[postgresql]") from None


def _open_sqlite(url: URL) -> Engine:
    if not url.database or ":memory:" in url.database:
        raise ConfigError("database_url must name a file that several processes can open: sqlite:////path/impasto.db")
    if sqlite.sqlite_version_info < SAFE_SQLITE:
        raise ConfigError(f"SQLite {sqlite.sqlite_version} is not safe here; a pysqlite3 wheel brings a newer one")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, module=sqlite, **_POOL)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    """Set up a new connection: WAL, every commit synced to disk, and transactions begun by us alone."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    _switch_to_wal(cursor)
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    """Turn WAL on, once per file; SQLite does not wait by itself when two processes do this at once."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at once unless told to read: a lock taken half-way can fail without waiting."""
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN IMMEDIATE"))


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a connection that only reads, all from one moment on SQLite.

    Raises:
        Unavailable: The database cannot be reached or is too busy.
    """
    with _unavailable(), engine.connect() as connection:
        yield connection.execution_options(**{_BEGIN: "BEGIN"})


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that commits at the end of the block, or rolls back if it raises.

    Raises:
        Unavailable: The database cannot be reached, is full or too busy; nothing was written.
    """
    with _unavailable(), engine.begin() as connection:
        yield connection


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout, sqlite.OperationalError) as error:
        raise Unavailable("the job store cannot answer now; try again in a few seconds") from error


class CommitCounter:
    """A number that changes when some other connection, of any process, has committed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._connection: PoolProxiedConnection | None = None  # SQLite compares against what this one saw last

    def read(self) -> int:
        """Return the number: cheap on SQLite; on PostgreSQL a query that sees changes of state only."""
        if self._engine.dialect.name != "sqlite":
            with reading(self._engine) as connection:
                return int(connection.execute(queries(self._engine.dialect.name)["last_event"]).scalar_one())
        with _unavailable(), self._lock:
            if self._connection is None:
                self._connection = self._engine.raw_connection()
            return int(self._connection.cursor().execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Give the connection back; a later ``read`` opens another."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def upgrade(engine: Engine, patience: float = 0.0) -> None:
    """Bring the tables to the newest form, in one transaction. Processes that start together take turns.

    Args:
        engine: The database.
        patience: Seconds to wait for a database that is not there yet.

    Raises:
        Unavailable: The database cannot be reached, or another process held it for too long.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return _upgrade(engine)
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            log.warning("waiting for the database: %s", error.__cause__)
            time.sleep(AWAY_SECONDS)


def _upgrade(engine: Engine) -> None:
    # Imported here: most imports of this module come from processes that never migrate.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
