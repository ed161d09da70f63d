"""Compares database, files and webhooks with what the clients were told.

Knows the promises: each accepted prediction ends once, in one state, with the pictures that its seed makes, stored by
one attempt; its webhook came under one id; what was cancelled stays so; what was uploaded is there.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageChops
from sqlalchemy import Engine, RowMapping, text

from impasto.errors import NotFound
from impasto.jobs.database import reading
from impasto.jobs.outputs import OutputStore
from impasto.jobs.states import TERMINAL, Outcome, Status
from impasto.types import GenerationRequest, seed_of_image
from impasto.worker.backend import draw_pattern
from tests.chaos.seen import Accepted, Seen, digest


def settled(engine: Engine, seen: Seen) -> bool:
    """Whether every job has ended and every webhook has come."""
    with reading(engine) as db:
        open_jobs = text("select count(*) from predictions where status in ('created', 'processing')")
        waiting = db.execute(open_jobs).scalar_one()
    with seen.lock:
        return not waiting and all(seen.webhooks.get(one.id) for one in seen.accepted.values() if one.webhook)


class Verdict:
    """What is wrong, and how the accepted jobs ended.

    Args:
        engine: The database.
        outputs: The files.
        seen: What the clients saw.
    """

    def __init__(self, engine: Engine, outputs: OutputStore, seen: Seen) -> None:
        self._outputs = outputs
        with reading(engine) as db:
            self._rows = {row["id"]: row for row in _all(db.execute(text("select * from predictions")))}
            events = db.execute(text("select prediction_id, type from events")).all()
            attempts = db.execute(text("select prediction_id, outcome from attempts")).all()
            self._uploads = {
                f"/uploads/{row.id}": row.blob
                for row in db.execute(text("select * from uploads where blob is not null"))
            }
        self._ends = Counter(row.prediction_id for row in events if row.type in TERMINAL)
        self._delivered = Counter(row.prediction_id for row in attempts if row.outcome == Outcome.OK)
        self.attempts = len(attempts)
        self.states = Counter(str(self._rows[id]["status"]) for id in seen.accepted if id in self._rows)
        self.lost = [id for id in seen.accepted if id not in self._rows]
        self.double = [id for id in seen.accepted if self._ends[id] > 1 or self._delivered[id] > 1]
        nothing = [] if seen.accepted else ["no job was accepted, so nothing was tried"]
        self.wrong = [*nothing, *seen.odd, *self._repeated(), *self._lost_uploads(seen)]
        for accepted in seen.accepted.values():
            self.wrong += [f"{accepted.id} {problem}" for problem in self._problems(accepted, seen)]

    def _problems(self, accepted: Accepted, seen: Seen) -> Iterator[str]:
        row = self._rows.get(accepted.id)
        if row is None:
            yield "was accepted and is lost"
            return
        status = row["status"]
        if status not in (Status.COMPLETED, Status.CANCELLED):
            yield f"is {status}: {row['error']}"
        if self._ends[accepted.id] != 1 or self._delivered[accepted.id] != (status == Status.COMPLETED):
            yield f"ended {self._ends[accepted.id]} times and was delivered {self._delivered[accepted.id]} times"
        if accepted.cancelled and status != Status.CANCELLED:
            yield f"was cancelled and is {status}"
        if status == Status.CANCELLED and not row["cancel_requested"]:
            yield "was cancelled by nobody"
        if accepted.webhook and len(ids := seen.webhooks.get(accepted.id, set())) != 1:
            yield f"has webhooks under {len(ids)} ids"
        yield from self._wrong_pictures(row, accepted)

    def _wrong_pictures(self, row: RowMapping, accepted: Accepted) -> Iterator[str]:
        outputs = json.loads(row["outputs"])
        request = GenerationRequest.from_json(json.loads(row["input"])["request"])
        if len(outputs) != (request.num_images if row["status"] == Status.COMPLETED else 0):
            yield f"is {row['status']} with {len(outputs)} pictures"
        if any(not output["blob"].startswith(f"{row['id']}/{row['attempt']}-") for output in outputs):
            yield "has pictures of another attempt"
        try:
            files = [self._outputs.get(output["blob"]) for output in outputs]
        except NotFound:
            yield "is completed and its pictures are gone"
            return
        for index, file in enumerate(files):
            expected = draw_pattern(request, seed_of_image(row["seed"], index))
            if ImageChops.difference(Image.open(io.BytesIO(file)).convert("RGB"), expected).getbbox():
                yield f"has another picture {index} than its seed makes"
        if accepted.told is not None and accepted.told != [digest(file) for file in files]:
            yield "has other pictures than its client was given"

    def _repeated(self) -> list[str]:
        keys = Counter(row["idempotency_key"] for row in self._rows.values() if row["idempotency_key"])
        return [f"idempotency key {key} made {count} jobs" for key, count in keys.items() if count > 1]

    def _lost_uploads(self, seen: Seen) -> Iterator[str]:
        for path, expected in seen.uploads.items():
            blob = self._uploads.get(path.rpartition(".")[0])
            try:
                if blob is None or digest(self._outputs.get_upload(blob)) != expected:
                    yield f"upload {path} is lost or changed"
            except NotFound:
                yield f"the file of upload {path} is gone"


def _all(result: Any) -> list[RowMapping]:
    return list(result.mappings())
