"""What a claim costs hardly grows with the queue: it weighs 64 jobs, however many wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import text

from impasto.jobs.database import writing
from impasto.jobs.queries import queries
from impasto.jobs.records import NewJob

WINDOW, WAITING = 64, 300
VALUES = {"pool": "default", "limit": 1, "worker": "ann", "lease": 1000, "loaded": '["x"]', "bucket": 4.0}


def test_a_claim_looks_at_few_rows(store, database, alice):
    """On SQLite each step searches an index. On PostgreSQL no step looks at every waiting job for each of the 64.

    PostgreSQL may still read a small table as a whole, once; it has no statistics of it here.
    """
    for _ in range(WAITING):
        store.create(NewJob("fake", {}, alice, seed=1, lora_key=("x",)), 10_000)
    for _ in range(10):
        store.claim("ann", 1, 60)
    statement = queries(database.dialect.name)["claim_jobs"].text
    with writing(database) as db:
        if database.dialect.name == "sqlite":
            steps = [row.detail for row in db.execute(text(f"explain query plan {statement}"), VALUES)]
            assert any("predictions_waiting" in step for step in steps)
            assert not [step for step in steps if step.startswith(("SCAN p", "SCAN predictions"))], steps
            return
        plan = db.execute(text(f"explain (analyze, format json) {statement}"), VALUES).scalar_one()
    plan = json.loads(plan) if isinstance(plan, str) else plan
    touched = max(rows for _, rows in nodes(plan[0]["Plan"]))
    assert touched <= WINDOW * WINDOW + WAITING, touched


def nodes(plan: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Each step, with the rows that it looked at in all its rounds."""
    removed = sum(value for name, value in plan.items() if name.startswith("Rows Removed"))
    yield plan["Node Type"], (plan["Actual Rows"] + removed) * plan["Actual Loops"]
    for part in plan.get("Plans", ()):
        yield from nodes(part)
