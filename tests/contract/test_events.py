"""Following a prediction, over the socket: server-sent events and the long poll."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from impasto.worker.backend import FakeBackend
from impasto.worker.loop import WorkerLoop

from .conftest import Stack, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]
Event = dict[str, Any]  # event, id, data


@contextmanager
def working(stack: Stack, step_seconds: float = 0.03, **options: Any) -> Iterator[WorkerLoop]:
    """A worker whose steps take so long, with previews unless told otherwise."""
    options = {"name": "host-1", "lora_dir": stack.settings.lora_dir, "previews": True} | options
    loop = WorkerLoop(stack.store, stack.outputs, FakeBackend(step_seconds), **options)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield loop
    finally:
        loop.stop()
        thread.join(10)


def events_of(lines: Iterator[str]) -> Iterator[Event]:
    """Read events as a browser does; comments and retry times are left out."""
    event: Event = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if not line and "data" in event:
            yield {**event, "data": json.loads(event["data"])}
            event = {}
        elif name in ("event", "id", "data"):
            event[name] = value


def follow(client: httpx.Client, job_id: str, version: str = "v3", **headers: str) -> Iterator[Event]:
    """Yield a prediction's events to the end of the stream."""
    with client.stream("GET", f"/api/{version}/predictions/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield from events_of(answer.iter_lines())


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_prediction_is_followed_from_its_start_to_its_end(stack: Stack, version: str) -> None:
    """States, steps with their noise levels, pictures that clear; then the stream ends by itself."""
    client = stack.client()
    job_id = submit(client, version=version, num_inference_steps=50, num_images=2)["id"]
    stream = follow(client, job_id, version)
    events = [next(stream)]
    with working(stack):
        events += stream

    states = [event for event in events if event["event"] == "status"]
    assert [event["data"]["status"] for event in states] == ["created", "processing", "completed"]
    assert sorted({int(event["id"]) for event in states}) == [int(event["id"]) for event in states]
    assert events[-1] == states[-1]
    read = client.get(f"/api/{version}/predictions/{job_id}/result").json()["data"]
    assert states[-1]["data"] == read

    steps = [event["data"] for event in events if event["event"] == "progress"]
    assert len(steps) >= 3
    assert [step["step"] for step in steps] == sorted({step["step"] for step in steps})
    assert all(step["total"] == 50 for step in steps)
    assert [step["sigma"] for step in steps] == sorted((step["sigma"] for step in steps), reverse=True)

    previews = [event["data"] for event in events if event["event"] == "preview"]
    assert {preview["index"] for preview in previews} == {0, 1}
    for preview in previews:
        data = base64.b64decode(preview["image"], validate=True)
        assert len(data) <= 8192
        assert preview["content_type"] == "image/jpeg"
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG" and max(image.size) <= 192
    assert all("id" not in event for event in events if event["event"] != "status")


def test_the_present_state_comes_at_once(stack: Stack) -> None:
    """Whoever comes late is told how things stand, not how they came about."""
    client = stack.client()
    job_id = submit(client, seed=3)["id"]
    [job] = [job for job in stack.claim() if job.id == job_id]
    stack.store.heartbeat("test-worker", {job.lease: {"step": 7, "total": 30}}, 60)
    start = time.monotonic()
    stream = follow(client, job_id)
    first, second = next(stream), next(stream)
    assert time.monotonic() - start < 1
    assert (first["event"], first["data"]["status"]) == ("status", "processing")
    assert first["data"]["progress"] == {"step": 7, "total": 30}
    assert (second["event"], second["data"]) == ("progress", {"step": 7, "total": 30})
    stack.complete(job)
    assert [event["data"]["status"] for event in stream] == ["completed"]


def test_a_stream_is_taken_up_where_it_broke(stack: Stack) -> None:
    """``Last-Event-ID``: a state that was told is not told again, a later one is; after the end there is nothing."""
    client = stack.client()
    job_id = submit(client)["id"]
    told = next(follow(client, job_id))
    assert told["data"]["status"] == "created"
    [job] = [job for job in stack.claim() if job.id == job_id]
    resumed = follow(client, job_id, **{"Last-Event-ID": told["id"]})
    started = next(resumed)
    assert started["data"]["status"] == "processing"
    assert int(started["id"]) > int(told["id"])

    again = follow(client, job_id, **{"Last-Event-ID": started["id"]})
    stack.store.heartbeat("test-worker", {job.lease: {"step": 1, "total": 30}}, 60)
    assert next(again)["event"] == "progress"
    stack.complete(job)
    [ended] = again
    assert ended["data"]["status"] == "completed"
    path = f"/api/v3/predictions/{job_id}/events"
    assert client.get(path, headers={"Last-Event-ID": ended["id"]}).status_code == 204
    assert [event["data"]["status"] for event in follow(client, job_id, **{"Last-Event-ID": "?"})] == ["completed"]


def test_cancelled_and_failed_predictions_end_their_streams(stack: Stack) -> None:
    """The words are the public ones: to clients a cancelled job has failed."""
    client = stack.client()
    job_id = submit(client)["id"]
    stream = follow(client, job_id)
    assert next(stream)["data"]["status"] == "created"
    stack.store.cancel(job_id, stack.keys.authenticate(stack.key).id)
    [last] = stream
    assert last["data"]["status"] == "failed"
    assert last["data"]["error"].startswith("cancelled")


def test_nobody_follows_what_is_not_theirs(stack: Stack) -> None:
    """Refusals come before the stream begins, in the usual body."""
    mine = submit(stack.client())["id"]
    path = f"/api/v3/predictions/{mine}/events"
    assert "Authorization" in refusal(stack.client(key="").get(path), 401)
    assert refusal(stack.client(stack.new_key()).get(path), 404) == "no such prediction"
    for unknown in ("0" * 32, "nonsense"):
        assert refusal(stack.client().get(f"/api/v3/predictions/{unknown}/events"), 404) == "no such prediction"


def raw_stream(stack: Stack, path: str) -> http.client.HTTPConnection:
    """Open a stream with as little as possible around it."""
    connection = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=20)
    connection.request("GET", path, headers={"Authorization": f"Bearer {stack.key}"})
    return connection


def test_two_hundred_listeners_cost_one_look(serve: Serve) -> None:
    """All are told, no more than ten looks a second are taken for them, polls go on; when they go, nothing is left."""
    with serve() as stack:
        client = stack.client()
        job_id = submit(client)["id"]
        connections = [raw_stream(stack, f"/api/v3/predictions/{job_id}/events") for _ in range(200)]
        answers = [connection.getresponse() for connection in connections]
        glances = stack.app.state.service.glances
        looks, look = [], glances.look
        glances.look = lambda ids: [looks.append(len(ids)), look(ids)][1]
        [job] = stack.claim()
        start, slowest = time.monotonic(), 0.0
        for step in range(1, 11):
            stack.store.heartbeat("test-worker", {job.lease: {"step": step, "total": 10}}, 60)
            polled = time.monotonic()
            assert client.get(f"/api/v3/predictions/{job_id}").status_code == 200
            slowest = max(slowest, time.monotonic() - polled)
            time.sleep(0.2)
        took = time.monotonic() - start
        stack.complete(job)
        bodies = [answer.read().decode() for answer in answers]
        assert all('"status":"completed"' in body and '"step": 10' in body for body in bodies)
        assert set(looks) == {1}, "one job, however many follow it"
        assert len(looks) <= 10 * took + 3
        assert slowest < 2
        for connection in connections:
            connection.close()
        listeners = stack.app.state.service.listeners
        deadline = time.monotonic() + 5
        while len(listeners) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(listeners) == 0


def test_a_client_that_goes_leaves_nothing(serve: Serve) -> None:
    """Its stream is forgotten at once, though its prediction still waits."""
    with serve() as stack:
        job_id = submit(stack.client())["id"]
        listeners = stack.app.state.service.listeners
        connection = raw_stream(stack, f"/api/v3/predictions/{job_id}/events")
        connection.getresponse().read(40)
        assert len(listeners) == 1
        connection.close()
        deadline = time.monotonic() + 5
        while len(listeners) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(listeners) == 0


def test_a_silent_stream_is_kept_open(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies close what says nothing for long; a comment is nothing to a client."""
    monkeypatch.setattr("impasto.api.events.KEEP_ALIVE", 0.2)
    with serve() as stack:
        job_id = submit(stack.client())["id"]
        connection = raw_stream(stack, f"/api/v3/predictions/{job_id}/events")
        answer = connection.getresponse()
        lines = [answer.readline() for _ in range(12)]
        assert lines.count(b": still here\n") >= 2
        connection.close()


def test_a_server_that_stops_ends_the_streams(serve: Serve) -> None:
    """At once: a stream must not hold up a restart, and the client can come back."""
    with serve() as stack:
        job_id = submit(stack.client())["id"]
        connection = raw_stream(stack, f"/api/v3/predictions/{job_id}/events")
        answer = connection.getresponse()
        answer.readline()
        stopped = time.monotonic()
        stack.server.should_exit = True
        answer.read()
        assert time.monotonic() - stopped < 1.5
        connection.close()


# Long poll


def test_a_reader_can_wait_for_the_end(stack: Stack) -> None:
    """``?wait=``: one request instead of many, answered as soon as the job ends."""
    client = stack.client()
    prediction = submit(client)
    [job] = [job for job in stack.claim() if job.id == prediction["id"]]
    timer = threading.Timer(0.5, stack.complete, [job])
    timer.start()
    start = time.monotonic()
    answer = client.get(prediction["urls"]["get"], params={"wait": 20}).json()["data"]
    assert answer["status"] == "completed"
    assert 0.4 < time.monotonic() - start < 3
    timer.join()


def test_a_wait_ends_when_its_time_is_over(stack: Stack) -> None:
    """The answer is the prediction as it is, a success like any poll."""
    client = stack.client()
    prediction = submit(client)
    start = time.monotonic()
    answer = client.get(f"/api/v2/predictions/{prediction['id']}?wait=0.3").json()["data"]
    assert answer["status"] == "created"
    assert 0.3 <= time.monotonic() - start < 2


@pytest.mark.parametrize("wait", ["61", "-1", "soon", "nan", "inf", ""])
def test_a_wrong_wait_is_named(stack: Stack, wait: str) -> None:
    """Nobody is to think that an hour was granted."""
    prediction = submit(stack.client())
    answer = stack.client().get(prediction["urls"]["get"], params={"wait": wait})
    assert "wait" in refusal(answer, 400)
