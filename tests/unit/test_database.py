"""What the database promises: safe switches, one form of the tables, and plain words when it cannot answer."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pysqlite3.dbapi2 as sqlite
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from impasto.errors import ConfigError, Unavailable
from impasto.jobs import database as module
from impasto.jobs.database import MIGRATIONS, CommitCounter, open_database, reading, upgrade, writing
from impasto.jobs.limits import KeyLimits
from impasto.jobs.queries import DIALECTS, queries


@pytest.fixture
def file(tmp_path, empty_sqlite) -> Path:
    """A SQLite database with the tables."""
    return Path(shutil.copy(empty_sqlite, tmp_path / "impasto.db"))


@pytest.fixture
def engine(file):
    engine = open_database(f"sqlite:///{file}")
    yield engine
    engine.dispose()


# Opening


def test_a_commit_is_on_the_disk_when_it_returns(engine):
    """WAL with every commit synced; no memory map, which makes known faults of SQLite worse."""
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "mmap_size": 0, "busy_timeout": 15_000}
    with reading(engine) as db:
        found = {name: db.exec_driver_sql(f"pragma {name}").scalar() for name in wanted}
    assert found == wanted


def test_the_folder_is_made_when_it_is_missing(tmp_path):
    """A fresh data folder needs no preparation."""
    engine = open_database(f"sqlite:///{tmp_path}/a/b/impasto.db")
    upgrade(engine)
    engine.dispose()
    assert (tmp_path / "a" / "b" / "impasto.db").is_file()


def test_a_new_file_opened_many_times_at_once_waits_its_turn(tmp_path):
    """SQLite refuses to wait while WAL is being turned on (7 of 1,800 tries); ``open_database`` waits for it."""

    def start(path: Path) -> None:
        engine = open_database(f"sqlite:///{path}")
        with writing(engine) as db:
            db.exec_driver_sql("create table if not exists t (x)")
        engine.dispose()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(start, [tmp_path / f"{n // 6}.db" for n in range(180)]))


@pytest.mark.parametrize("url", ["", "impasto.db", "mysql://host/impasto", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_cannot_work_stops_the_start_with_the_remedy(url):
    """One that several processes cannot share is as wrong as one we do not speak."""
    with pytest.raises(ConfigError, match=r"database_url.*sqlite:////path"):
        open_database(url)


def test_a_password_in_a_wrong_url_is_not_repeated():
    """Start-up messages end up in logs."""
    with pytest.raises(ConfigError) as caught:
        open_database("mysql://me:secret@host/impasto")
    assert "secret" not in str(caught.value)


def test_postgresql_without_its_driver_names_the_package(monkeypatch):
    """An import error deep in a library is no answer to an operator."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"install impasto\[postgresql\]"):
        open_database("postgresql://host/impasto")


def test_a_sqlite_with_the_wal_fault_is_refused(tmp_path, monkeypatch):
    """Versions before 3.51.3 can corrupt a file that several processes write."""
    monkeypatch.setattr(module.sqlite, "sqlite_version_info", (3, 51, 2))
    with pytest.raises(ConfigError, match="not safe"):
        open_database(f"sqlite:///{tmp_path}/impasto.db")


# Transactions


def test_a_block_that_raises_writes_nothing(engine):
    """A transaction is all or nothing."""

    def half_done() -> None:
        with writing(engine) as db:
            _add_key(db, "laptop")
            raise KeyError("half done")

    with pytest.raises(KeyError, match="half done"):
        half_done()
    assert _names(engine) == []


def test_a_writer_that_finds_the_file_locked_too_long_says_try_again(file, monkeypatch):
    """The user reads that the store is busy; the cause stays in the chain for the log."""
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.1)
    first, second = (open_database(f"sqlite:///{file}") for _ in range(2))
    with writing(first) as db:
        _add_key(db, "laptop")
        with pytest.raises(Unavailable, match="try again") as caught, writing(second):
            pass
        assert "locked" in str(caught.value.__cause__)
    with writing(second) as db:
        _add_key(db, "server")
    assert _names(first) == ["laptop", "server"]
    first.dispose()
    second.dispose()


def test_reading_goes_on_while_another_writes(engine):
    """Polls never wait for a writer, and see what was committed."""
    with writing(engine) as db:
        _add_key(db, "laptop")
        assert _names(engine) == []
    assert _names(engine) == ["laptop"]


def test_writers_take_turns(engine):
    """Two hundred writes from eight threads: none fails, none is lost."""

    def write(n: int) -> None:
        with writing(engine) as db:
            _add_key(db, f"key {n:03}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len(_names(engine)) == 200


def test_a_missing_table_is_not_a_crash_in_the_users_face(tmp_path):
    """Whatever the database says, the user reads one plain sentence."""
    engine = open_database(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(Unavailable, match="job store"):
        _names(engine)
    engine.dispose()


def test_the_commit_counter_opens_again_after_it_was_closed(engine):
    """Closing gives a connection back, no more."""
    counter = CommitCounter(engine)
    counter.read()
    counter.close()
    counter.close()
    assert counter.read() == counter.read()
    counter.close()


def _add_key(db, name: str) -> None:
    values = {"id": name, "name": name, "prefix": "", "secret_hash": name, "scopes": "read", "lifetime": None}
    db.execute(queries(db.dialect.name)["create_key"], values | KeyLimits().to_row())


def _names(engine) -> list[str]:
    with reading(engine) as db:
        return sorted(row.name for row in db.execute(queries("sqlite")["list_keys"]))


# Tables


def test_an_upgrade_makes_every_table(database):
    """On either kind of database, and it says which revision it is at."""
    tables = set(inspect(database).get_table_names())
    assert {"keys", "predictions", "attempts", "events", "uploads", "webhooks", "workers", "alembic_version"} <= tables


def test_a_second_upgrade_changes_nothing(database):
    """Every start may upgrade."""
    with writing(database) as db:
        _add_key(db, "laptop")
    upgrade(database)
    with reading(database) as db:
        assert db.execute(text("select count(*) from keys")).scalar_one() == 1


def test_revisions_form_one_line():
    """Two heads would leave it open which tables a database has."""
    assert len(ScriptDirectory(str(MIGRATIONS)).get_heads()) == 1


def test_an_upgrade_that_fails_leaves_no_half_made_tables(tmp_path, monkeypatch):
    """All revisions run in one transaction, on SQLite too."""
    from alembic import op

    real, made = op.create_table, []

    def third_fails(name, *columns):
        made.append(name)
        if len(made) == 3:
            raise RuntimeError("power cut")
        return real(name, *columns)

    engine = open_database(f"sqlite:///{tmp_path}/impasto.db")
    with monkeypatch.context() as patch:
        patch.setattr(op, "create_table", third_fails)
        with pytest.raises(RuntimeError, match="power cut"):
            upgrade(engine)
    assert inspect(engine).get_table_names() == []
    upgrade(engine)
    assert "events" in inspect(engine).get_table_names()
    engine.dispose()


UPGRADER = """
import sys, time
from alembic import command  # imported early, so that both processes really meet
from impasto.jobs.database import open_database, upgrade
print("ready", flush=True)
time.sleep(max(0, float(sys.stdin.readline()) - time.time()))
upgrade(open_database(sys.argv[1]))
"""


def test_processes_that_start_at_once_upgrade_once(tmp_path):
    """The API and its worker open a new file in the same instant: both succeed, twice in two."""
    for round in range(2):
        path = tmp_path / f"{round}" / "impasto.db"
        command = [sys.executable, "-c", UPGRADER, f"sqlite:///{path}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        start = f"{time.time() + 0.2}\n"
        for process in processes:
            process.stdin.write(start)
            process.stdin.flush()
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
        with sqlite.connect(path) as db:
            assert db.execute("select version_num from alembic_version").fetchall() == [("0005",)]
        db.close()


# Statements


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_statement_is_complete_in_both_dialects(dialect):
    """No placeholder of one dialect is left open in the other."""
    for name, statement in queries(dialect).items():
        assert statement.text.strip(), name
        assert "$" not in statement.text, name


def test_every_statement_has_a_name_and_a_sentence():
    """The files are read by people."""
    source = "".join(path.read_text() for path in (MIGRATIONS.parent / "sql").glob("*.sql"))
    for name in queries("sqlite"):
        comment = source.split(f"-- {name} --\n")[1].splitlines()[0]
        assert comment.startswith("-- "), name


def test_every_statement_is_used():
    """A statement that nobody runs would rot."""
    code = "".join(path.read_text() for path in MIGRATIONS.parent.glob("*.py"))
    assert [name for name in queries("sqlite") if f'"{name}"' not in code] == []


def test_every_statement_fits_the_tables(engine):
    """Each is understood by a real database: no misspelt column waits for its day."""
    for name, statement in queries("sqlite").items():
        values = dict.fromkeys(statement.compile().params)
        with reading(engine) as db:
            assert db.execute(text(f"explain {statement.text}"), values).all(), name
