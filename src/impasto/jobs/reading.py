"""Reads many jobs in one statement.

Knows rows. Knows nothing of who may see them: whoever asks checks the key.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from sqlalchemy import Engine

from impasto.jobs.database import reading
from impasto.jobs.queries import queries
from impasto.jobs.records import Job


class JobReader:
    """Reads jobs; every method raises ``Unavailable`` when the database cannot answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)

    def read(self, ids: Collection[str]) -> dict[str, Job]:
        """Return those of the jobs that are there, by id; a deleted one is not."""
        with reading(self._engine) as db:
            rows = db.execute(self._queries["jobs"], {"ids": json.dumps(list(ids))}).mappings().all()
        return {row["id"]: Job.from_row(row) for row in rows}
