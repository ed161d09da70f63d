"""A fresh job store for each test, and one thread for networks that are too small for more.

Knows where databases are made: a new SQLite file, and a new database of a real PostgreSQL. Knows nothing of what is
tested.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from impasto.jobs.database import open_database, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.store import JobStore
from tests.postgres import drop_database, new_database


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with all tables and no rows, to be copied."""
    path = tmp_path_factory.mktemp("template") / "impasto.db"
    engine = open_database(f"sqlite:///{path}")
    upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, empty_sqlite: Path) -> Iterator[str]:
    """URL of an upgraded, empty database."""
    if request.param == "sqlite":
        shutil.copy(empty_sqlite, tmp_path / "impasto.db")
        yield f"sqlite:///{tmp_path / 'impasto.db'}"
        return
    url = new_database()
    yield url
    drop_database(url)


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    """An engine on an upgraded, empty database."""
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(database: Engine) -> Iterator[JobStore]:
    """A job store without jobs."""
    store = JobStore(database)
    yield store
    store.close()


@pytest.fixture
def keys(database: Engine) -> KeyStore:
    """A key store without keys, on the database of ``store``."""
    return KeyStore(database)


@pytest.fixture
def alice(keys: KeyStore) -> str:
    """Id of an API key."""
    return keys.authenticate(keys.create("alice")).id


@pytest.fixture
def bob(keys: KeyStore) -> str:
    """Id of another API key."""
    return keys.authenticate(keys.create("bob")).id


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing work between threads."""
    import torch  # most tests of this folder need none

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
