"""Synchronous requests whose clients hang up: what becomes of the job, and what the same request sent again finds.

Two widely used clients give up after ten seconds and post the same body again, up to five times; here the times are
shorter. The jobs are done by hand, so that a test can hold one in any state.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from impasto.api import hold
from impasto.api.app import create_app
from impasto.jobs import store as store_module
from impasto.jobs.database import open_database
from impasto.jobs.keys import KeyStore
from impasto.jobs.records import Job
from impasto.jobs.store import WITHDRAWN, JobStore

from .conftest import MODEL, Stack, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]
BODY = {"prompt": "a red fox", "size": "512*512", "enable_sync_mode": True}
TEXT = json.dumps(BODY)


@contextmanager
def held_open(stack: Stack, **headers: str) -> Iterator[None]:
    """Post a synchronous request, and hang up at the end of the block: before it the job is there and held."""
    before = [job["holders"] for job in jobs(stack)]
    host, port = stack.url.removeprefix("http://").split(":")
    lines = {"Host": host, "Authorization": f"Bearer {stack.key}", "Content-Length": str(len(TEXT))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST /api/v3/{MODEL} HTTP/1.1\r\n{head}\r\n{TEXT}".encode())
        until(lambda: [job["holders"] for job in jobs(stack)] != before)
        yield


def drop(stack: Stack) -> dict[str, Any]:
    """Post a synchronous request, hang up, and return its withdrawn job."""
    with held_open(stack):
        pass
    (job,) = until(lambda: [job for job in jobs(stack) if job["withdrawn"]])
    return job


def begun_and_dropped(stack: Stack) -> Job:
    """The job, in a worker's hands, of a synchronous request whose client has hung up."""
    with held_open(stack):
        job = claim_one(stack)
    until(lambda: jobs(stack)[0]["dropped_at"])
    return job


def jobs(stack: Stack) -> list[dict[str, Any]]:
    """All jobs of the database, the oldest first."""
    with stack.store.engine.connect() as db:
        rows = db.exec_driver_sql("select * from predictions order by created_at, id").mappings()
        return [dict(row) for row in rows]


def until(found: Callable[[], Any], seconds: float = 5) -> Any:
    """Wait for something to be there; return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.01)
    return pytest.fail("it did not come")


@pytest.fixture
def fresh(serve: Serve) -> Iterator[Stack]:
    """A service without jobs."""
    with serve() as stack:
        yield stack


@contextmanager
def another_process(stack: Stack) -> Iterator[str]:
    """A second API on the same database and files, as another process would open them; its URL."""
    engine = open_database(stack.settings.database)
    store = JobStore(engine)
    app = create_app(stack.settings, store, KeyStore(engine), stack.outputs)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=2))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            store.close()
            engine.dispose()


def test_a_dropped_request_that_waits_is_withdrawn_at_once(fresh: Stack) -> None:
    """Nobody reads the pictures, so no worker draws them; whoever looks reads why. The queue is as if it were gone."""
    with held_open(fresh):
        assert fresh.store.queue_depth() == 1  # control
    until(lambda: jobs(fresh)[0]["withdrawn"], seconds=0.4)
    assert fresh.claim() == []
    assert fresh.store.queue_depth() == 0
    shown = fresh.client().get(f"/api/v3/predictions/{jobs(fresh)[0]['id']}/result").json()["data"]
    assert (shown["status"], shown["error"], shown["code"]) == ("failed", WITHDRAWN, 1405)
    assert (shown["outputs"], shown["executionTime"]) == ([], 0)


def post(stack: Stack, url: str = "", key: str | None = None, **body: Any) -> Callable[[], dict[str, Any]]:
    """Post a synchronous request in the background; what is returned waits for its prediction."""
    answers: list[httpx.Response] = []
    client = stack.client(key)
    where = f"{url or stack.url}/api/v3/{MODEL}"
    thread = threading.Thread(target=lambda: answers.append(client.post(where, json=BODY | body)))
    thread.start()

    def prediction() -> dict[str, Any]:
        thread.join(10)
        (answer,) = answers
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    return prediction


def waiting(stack: Stack, count: int = 1) -> list[dict[str, Any]]:
    """The jobs, once so many of them wait for a worker."""
    until(lambda: stack.store.queue_depth() == count)
    return jobs(stack)


def claim_one(stack: Stack) -> Job:
    """The job due next, held as a worker holds it."""
    return until(lambda: stack.store.claim("test-worker", 1, 60.0))[0]


def test_the_same_request_has_its_old_place_again(fresh: Stack) -> None:
    """One id, and no later than before: a request that came between stays behind."""
    drop(fresh)
    later = submit(fresh.client())
    again = post(fresh)
    first, _ = waiting(fresh, 2)
    assert [job.id for job in fresh.claim() if not fresh.complete(job)] == [first["id"], later["id"]]
    done = again()
    assert (done["id"], done["status"], len(done["outputs"])) == (first["id"], "completed", 1)


def test_a_job_that_has_begun_goes_on_and_is_joined(fresh: Stack) -> None:
    """The second request is answered with the first one's pictures."""
    job = begun_and_dropped(fresh)
    again = post(fresh)
    until(lambda: jobs(fresh)[0]["dropped_at"] is None)
    assert fresh.claim() == []
    fresh.complete(job)
    assert (again()["id"], again()["status"], len(jobs(fresh))) == (job.id, "completed", 1)


def test_a_job_that_ended_meanwhile_is_answered_at_once_and_once(fresh: Stack) -> None:
    """The request that comes again takes the result; the next one like it is a new wish."""
    job = begun_and_dropped(fresh)
    fresh.complete(job)
    assert post(fresh)()["id"] == job.id
    another = post(fresh)
    fresh.complete(claim_one(fresh))
    assert another()["id"] != job.id


def test_a_job_that_failed_is_not_joined(fresh: Stack) -> None:
    """Sending the same again is then a try, not a look."""
    job = begun_and_dropped(fresh)
    fresh.store.fail(job.lease, "no luck", "ModelError")
    again = post(fresh)
    fresh.complete(claim_one(fresh))
    assert (again()["id"] != job.id, again()["status"]) == (True, "completed")


def test_nobody_else_and_nothing_else_joins(fresh: Stack) -> None:
    """Another key, another value or another model is another job; the order and spacing of the JSON do not matter."""
    drop(fresh)
    others = [post(fresh, key=fresh.new_key()), post(fresh, guidance_scale=6)]
    waiting(fresh, 2)
    fresh.work_off()
    (first, *_) = jobs(fresh)
    assert first["id"] not in {other()["id"] for other in others}
    text = '{ "enable_sync_mode":true, "size" : "512*512","prompt":"a red fox"}'
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(fresh.client().post, f"/api/v2/{MODEL}", content=text)
        fresh.complete(claim_one(fresh))
        assert answer.result(10).json()["data"]["id"] == first["id"]


def test_after_the_time_it_ends_as_cancelled(fresh: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any worker's reap ends it for good, and the same request makes a new job."""
    monkeypatch.setattr(store_module, "REJOIN_SECONDS", 0.2)
    drop(fresh)
    fresh.store.reap(3)
    assert jobs(fresh)[0]["status"] == "created"  # control: not before its time
    time.sleep(0.25)
    fresh.store.reap(3)
    assert (jobs(fresh)[0]["status"], jobs(fresh)[0]["error"]) == ("cancelled", WITHDRAWN)
    again = post(fresh)
    fresh.complete(claim_one(fresh))
    assert again()["id"] != jobs(fresh)[0]["id"]


@pytest.mark.parametrize("queued", [False, True], ids=["begun", "queued"])
def test_clients_that_give_up_and_post_again_make_one_job(
    fresh: Stack, queued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real clients' habit, against two processes in turn: one job, begun once, one result."""
    monkeypatch.setattr(hold, "TWIN_SECONDS", (1.5, 1.5))  # as on a machine that is busy with other tests
    with another_process(fresh) as other:
        busy, needed = (1.7, 0.0) if queued else (0.0, 1.5)  # seconds until a worker is free, and for the work
        work = threading.Thread(target=slow_worker, args=(fresh, busy, needed))
        work.start()
        client, posts = fresh.client(), 0
        while True:
            where = (fresh.url, other)[posts % 2]
            posts += 1
            try:
                data = client.post(f"{where}/api/v3/{MODEL}", json=BODY, timeout=0.7).json()["data"]
                break
            except httpx.ReadTimeout:
                assert posts < 6
        work.join()
        (job,) = jobs(fresh)
        assert 2 <= posts <= 6
        assert (data["id"], data["status"], job["attempt"]) == (job["id"], "completed", 1)


def slow_worker(stack: Stack, busy: float, needed: float) -> None:
    """Take a job when free, and need longer for it than its client waits."""
    time.sleep(busy)
    job = claim_one(stack)
    time.sleep(needed)
    stack.complete(job)


def test_two_clients_side_by_side_are_two_jobs(fresh: Stack) -> None:
    """Nobody hung up: whoever asks twice at once wants two pictures, with two seeds."""
    both = [post(fresh), post(fresh)]
    waiting(fresh, 2)
    fresh.work_off()
    assert len({prediction()["seed"] for prediction in both}) == 2


def test_a_service_that_stops_leaves_the_job_where_it_is(serve: Serve) -> None:
    """Its clients did not hang up: they are told where to look, the work goes on, and a request again finds it."""
    with serve() as stack:
        with another_process(stack) as other:
            told = post(stack, other)
            waiting(stack)
        assert (told()["status"], told()["code"], told()["id"]) == ("processing", 5004, jobs(stack)[0]["id"])
        (job,) = jobs(stack)
        assert (job["withdrawn"], job["dropped_at"] is not None) == (0, True)
        again = post(stack)
        until(lambda: jobs(stack)[0]["dropped_at"] is None)
        stack.work_off()
        assert again()["id"] == job["id"]


# Idempotency-Key


def test_the_same_idempotency_key_is_the_same_prediction(fresh: Stack) -> None:
    """For good, also when it has ended, and from many threads at once; another API key's are its own."""
    client, body = fresh.client(**{"Idempotency-Key": "order 1"}), {"prompt": "a red fox"}

    def send(client: httpx.Client) -> str:
        return str(client.post(f"/api/v3/{MODEL}", json=body).json()["data"]["id"])

    with ThreadPoolExecutor(8) as pool:
        (first,) = set(pool.map(send, [client] * 16))
    fresh.work_off()
    assert send(client) == first
    assert send(fresh.client(fresh.new_key(), **{"Idempotency-Key": "order 1"})) != first
    assert send(fresh.client(**{"Idempotency-Key": ""})) != first
    assert len(jobs(fresh)) == 3


def test_an_idempotency_key_with_another_body_is_409(fresh: Stack) -> None:
    """The wrong picture would be worse than none; another model is another request, too."""
    client = fresh.client(**{"Idempotency-Key": "order 1"})
    submit(client)
    for model, body in ((MODEL, {"prompt": "a cat"}), ("stability-ai/sdxl", {"prompt": "a red fox"})):
        assert "Idempotency-Key" in refusal(client.post(f"/api/v3/{model}", json=body), 409)
    assert len(jobs(fresh)) == 1


@pytest.mark.parametrize("key", ["x" * 256, b"\xe9", b"a\tb"], ids=["long", "latin", "tab"])
def test_an_idempotency_key_that_is_none_is_400(stack: Stack, http: httpx.Client, key: str | bytes) -> None:
    """Up to 255 printable ASCII characters."""
    headers = {"Idempotency-Key": key}
    assert "Idempotency-Key" in refusal(http.post(f"/api/v3/{MODEL}", json={"prompt": "a"}, headers=headers), 400)
    assert http.post(f"/api/v3/{MODEL}", json={"prompt": "a"}, headers={"Idempotency-Key": "x" * 255}).is_success


def test_two_who_hold_one_job_must_both_hang_up(fresh: Stack) -> None:
    """One idempotency key, two connections: the end of one takes nothing from the other."""
    header = {"Idempotency-Key": "order 1"}
    with ThreadPoolExecutor() as pool:
        with held_open(fresh, **header):
            other = pool.submit(fresh.client(**header).post, f"/api/v3/{MODEL}", json=BODY)
            until(lambda: jobs(fresh)[0]["holders"] == 2)
        until(lambda: jobs(fresh)[0]["holders"] == 1)
        fresh.work_off()
        assert other.result(10).json()["data"]["status"] == "completed"
    assert len(jobs(fresh)) == 1
    with held_open(fresh, **{"Idempotency-Key": "order 2"}):  # control: with nobody beside it, one is enough
        pass
    until(lambda: jobs(fresh)[1]["withdrawn"])
