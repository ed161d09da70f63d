"""A short run of ``make chaos`` on each database, and proof that its verdict can be "guilty"."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from impasto.images import encode_image
from impasto.jobs.database import open_database, upgrade, writing
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import NewJob, Output
from impasto.jobs.store import JobStore
from impasto.types import GenerationRequest, seed_of_image
from impasto.worker.backend import draw_pattern
from tests.chaos.run import Chaos
from tests.chaos.seen import Accepted, Seen, digest
from tests.chaos.verdict import Verdict

SECONDS = 10.0


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_accepted_job_is_lost_or_done_twice(tmp_path: Path, database: str):
    """API, workers and database are killed for ten seconds; afterwards every promise that a client heard is kept."""
    result = Chaos(database, seed=1, folder=tmp_path, clients=3, workers=2, apis=2).run(SECONDS)
    assert result.wrong == []
    assert (result.lost, result.double) == (0, 0)
    assert result.accepted > 0


REQUEST = GenerationRequest(prompt="job", width=64, height=64, num_inference_steps=1)


@pytest.fixture
def kept(tmp_path: Path):
    """A completed prediction, as the clients saw it, and everything as it should be."""
    engine = open_database(f"sqlite:///{tmp_path}/impasto.db")
    upgrade(engine)
    store, keys, outputs = JobStore(engine), KeyStore(engine), OutputStore(str(tmp_path / "outputs"))
    key_id = keys.authenticate(keys.create("chaos")).id
    job = store.create(NewJob("fake", {"request": REQUEST.to_json()}, key_id, seed=7, idempotency_key="k"), 10)
    [claimed] = store.claim("ann", 1, 60)
    data = encode_image(draw_pattern(REQUEST, seed_of_image(7, 0)), "png")
    blob = outputs.put(job.id, 1, 0, data, "image/png")
    store.complete(claimed.lease, [Output(blob, "image/png", 64, 64, nsfw=False, seed=7)], {})
    seen = Seen(accepted={job.id: Accepted(job.id, webhook=True, told=[digest(data)])})
    seen.webhooks[job.id] = {"msg_1"}
    yield engine, outputs, seen, job.id, blob
    store.close()
    engine.dispose()


def test_what_is_as_it_should_be_is_not_accused(kept):
    """Nothing wrong, nothing lost, nothing double."""
    engine, outputs, seen, *_ = kept
    verdict = Verdict(engine, outputs, seen)
    assert (verdict.wrong, verdict.lost, verdict.double) == ([], [], [])


CRIMES = {
    "lost": "delete from {table} where {column} = :id",
    "is failed": "update predictions set status = 'failed' where id = :id",
    "ended 2 times": "insert into events (prediction_id, type, at) values (:id, 'completed', 1)",
    "delivered 0 times": "update attempts set outcome = 'lease_lost' where prediction_id = :id",
    "with 0 pictures": "update predictions set outputs = '[]' where id = :id",
    "another attempt": "update predictions set attempt = 2 where id = :id",
    "another picture": "update predictions set seed = 8 where id = :id",
}


@pytest.mark.parametrize("crime", CRIMES)
def test_each_crime_in_the_database_is_found(kept, crime: str):
    """By the rows and the files alone."""
    engine, outputs, seen, id, _ = kept
    tables = {"webhooks": "prediction_id", "events": "prediction_id", "attempts": "prediction_id", "predictions": "id"}
    with writing(engine) as db:
        for table, column in tables.items() if crime == "lost" else [("", "")]:
            db.execute(text(CRIMES[crime].format(table=table, column=column)), {"id": id})
    assert any(crime in line for line in Verdict(engine, outputs, seen).wrong)


def test_each_crime_against_a_client_is_found(kept):
    """What it was told, sent or promised, and did not get."""
    engine, outputs, seen, id, blob = kept
    seen.webhooks[id] = {"msg_1", "msg_2"}
    seen.accepted[id].cancelled = True
    seen.accepted[id].told = ["other"]
    seen.uploads["/uploads/" + "a" * 32 + ".png"] = "b"
    seen.odd.append("two ids for one key")
    wrong = "\n".join(Verdict(engine, outputs, seen).wrong)
    for words in ("under 2 ids", "was cancelled and is completed", "its client was given", "upload", "two ids"):
        assert words in wrong
    outputs.delete([blob])
    assert any("pictures are gone" in line for line in Verdict(engine, outputs, seen).wrong)


def test_a_run_in_which_nothing_happened_proves_nothing(kept):
    """No job accepted is an accusation, too."""
    engine, outputs, *_ = kept
    assert Verdict(engine, outputs, Seen()).wrong
