"""Webhooks over real sockets: who is told, of what, signed how, how often, and where nothing is ever sent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import text
from standardwebhooks import Webhook, WebhookVerificationError

from impasto.api.delivery import Deliverer, Patience
from impasto.jobs.database import reading
from impasto.jobs.webhooks import WebhookStore
from tests.receiver import Receiver, receiving, verify_v3

from .conftest import MODEL, Stack, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Somebody who wants to be told."""
    with receiving() as listening:
        yield listening


@pytest.fixture
def open_stack(serve: Serve, receiver: Receiver) -> Iterator[Stack]:
    """A service whose operator allows the loopback receiver, and that tries again soon."""
    with serve(**allowing(receiver)) as running:
        yield running


def allowing(receiver: Receiver, **more: Any) -> dict[str, Any]:
    """The settings for a receiver on loopback."""
    allowed = {"webhook_allow": ["127.0.0.0/8"], "webhook_http": True, "webhook_ports": [receiver.port]}
    return allowed | {"webhook_pause": 0.2} | more


def asked(client: httpx.Client, receiver: Receiver, model: str = MODEL, **body: Any) -> dict[str, Any]:
    """Submit a job that tells the receiver."""
    return submit(client, f"{model}?webhook={quote(receiver.url, safe='')}", **body)


def secret(client: httpx.Client) -> str:
    """The key's webhook secret."""
    return str(client.get("/api/v3/webhook/secret").json()["data"]["secret"])


def outbox(stack: Stack) -> list[dict[str, Any]]:
    """The events as the database has them."""
    with reading(stack.store.engine) as db:
        return [dict(row) for row in db.execute(text("select * from webhooks order by created_at, id")).mappings()]


def settled(stack: Stack, seconds: float = 10.0) -> list[dict[str, Any]]:
    """The events, once none waits any more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        rows = outbox(stack)
        if rows and all(row["delivered_at"] or row["given_up_at"] for row in rows):
            return rows
        time.sleep(0.05)
    raise AssertionError(f"not settled: {outbox(stack)}")


# What is told


def test_a_finished_job_is_told_once_signed_and_bare(open_stack: Stack, receiver: Receiver) -> None:
    """The prediction object without envelope, as reading it gives it, and the request's fields beside it."""
    http = open_stack.client()
    made = asked(http, receiver, num_images=2, seed=5)
    assert receiver.calls == []
    open_stack.work_off()
    [call] = receiver.wait(1)
    told = json.loads(call.body)
    assert told.pop("input") == {"prompt": "a red fox", "size": "512*512", "num_images": 2, "seed": 5}
    assert told == http.get(made["urls"]["get"]).json()["data"]
    assert (told["id"], told["status"], len(told["outputs"])) == (made["id"], "completed", 2)
    assert httpx.get(told["outputs"][0], trust_env=False).status_code == 200
    assert call.headers["content-type"] == "application/json"
    assert verify_v3(secret(http), call)
    settled(open_stack)
    time.sleep(0.6)
    assert len(receiver.calls) == 1


def test_failed_and_cancelled_jobs_are_told_as_failed(open_stack: Stack, receiver: Receiver) -> None:
    """Both words that the store has for a bad end are one to clients."""
    http = open_stack.client()
    broken, waiting, running = (asked(http, receiver, seed=seed) for seed in (1, 2, 3))
    key = open_stack.keys.authenticate(open_stack.key).id
    open_stack.store.cancel(waiting["id"], key)
    claimed = {job.id: job for job in open_stack.claim()}
    assert open_stack.store.fail(claimed[broken["id"]].lease, "the disk is full", "Broken")
    open_stack.store.cancel(running["id"], key)
    open_stack.store.heartbeat("test-worker", {claimed[running["id"]].lease: {}}, 60.0)
    told = {event["id"]: event for event in (json.loads(call.body) for call in receiver.wait(3))}
    assert {event["status"] for event in told.values()} == {"failed"}
    assert told[broken["id"]]["error"] == "the disk is full"
    assert all(told[made["id"]]["error"].startswith("cancelled") for made in (waiting, running))


def test_addresses_in_the_event_are_on_the_host_that_was_called(serve: Serve, receiver: Receiver) -> None:
    """There is no request to take them from when it is sent."""
    with serve(**allowing(receiver)) as stack:
        with stack.client(Host="pictures.example") as http:
            asked(http, receiver, version="v2")
        stack.work_off()
        told = json.loads(receiver.wait(1)[0].body)
    assert told["urls"]["get"].startswith("http://pictures.example/api/v2/predictions/")
    assert told["outputs"][0].startswith("http://pictures.example/outputs/")


def test_a_synchronous_request_can_have_a_webhook(open_stack: Stack, receiver: Receiver) -> None:
    """Both are told."""
    with open_stack.worker():
        made = asked(open_stack.client(), receiver, enable_sync_mode=True)
    assert made["status"] == "completed"
    assert json.loads(receiver.wait(1)[0].body)["id"] == made["id"]


def test_a_deleted_prediction_is_told_to_nobody(serve: Serve, receiver: Receiver) -> None:
    """Its owner wanted it gone before it could be delivered."""
    receiver.statuses = [500]
    with serve(**allowing(receiver, webhook_pause=1.0)) as stack:
        http = stack.client()
        made = asked(http, receiver)
        stack.work_off()
        receiver.wait(1)
        assert http.post("/api/v3/predictions/delete", json={"ids": [made["id"]]}).status_code == 200
        [row] = settled(stack)
    assert (row["last_error"], len(receiver.calls)) == ("the prediction is gone", 1)


# Where the address may stand


@pytest.mark.parametrize("key", ["webhook", "webhook_url"])
def test_the_address_may_stand_in_the_body(open_stack: Stack, receiver: Receiver, key: str) -> None:
    """Documents differ; an empty one is none."""
    submit(open_stack.client(), **{key: receiver.url})
    submit(open_stack.client(), **{key: ""})
    open_stack.work_off()
    assert receiver.wait(1)[0].path == "/hook"
    assert len(settled(open_stack)) == 1


def test_an_address_that_a_client_appends_as_it_is(open_stack: Stack, receiver: Receiver) -> None:
    """One client does not escape it: its own query stays with it."""
    submit(open_stack.client(), f"{MODEL}?webhook={receiver.url}?job=1&user=2")
    open_stack.work_off()
    assert receiver.wait(1)[0].path == "/hook?job=1&user=2"


# Signatures


@pytest.mark.parametrize("kind", ["standard", "both"])
def test_the_standard_library_verifies(serve: Serve, receiver: Receiver, kind: str) -> None:
    """Standard Webhooks by setting, alone or beside v3; another secret or a changed body does not pass."""
    with serve(**allowing(receiver, webhook_signatures=kind)) as stack:
        http, stranger = stack.client(), stack.client(stack.new_key())
        made = asked(http, receiver)
        stack.work_off()
        [call] = receiver.wait(1)
        key = secret(http)
        assert Webhook(key).verify(call.body, dict(call.headers))["id"] == made["id"]
        for other, body in ((secret(stranger), call.body), (key, call.body.replace(b"fox", b"cat"))):
            with pytest.raises(WebhookVerificationError):
                Webhook(other).verify(body, dict(call.headers))
        assert ("v3," in call.headers["webhook-signature"]) == (kind == "both")
        assert kind == "standard" or verify_v3(key, call)
        assert kind == "standard" or not verify_v3(key, replace(call, body=call.body + b" "))


def test_each_key_has_a_secret_of_its_own_that_stays(stack: Stack, http: httpx.Client) -> None:
    """Made at the first ask, in either version; needs the key."""
    mine, theirs = secret(http), secret(stack.client(stack.new_key()))
    assert mine.startswith("whsec_")
    assert mine != theirs
    assert secret(http) == mine == http.get("/api/v2/webhook/secret").json()["data"]["secret"]
    refusal(stack.client("").get("/api/v3/webhook/secret"), 401)


# Trying again


def test_it_is_tried_again_with_the_same_id_until_somebody_takes_it(open_stack: Stack, receiver: Receiver) -> None:
    """After 500 and after a redirect, which is not followed; each try is signed anew."""
    receiver.statuses = [500, 302, 204]
    asked(open_stack.client(), receiver)
    open_stack.work_off()
    calls = receiver.wait(3)
    [row] = settled(open_stack)
    assert {call.headers["webhook-id"] for call in calls} == {row["id"]}
    assert {call.path for call in calls} == {"/hook"}
    assert all(verify_v3(secret(open_stack.client()), call) for call in calls)
    assert (row["attempt"], row["last_error"]) == (3, "")
    assert row["delivered_at"]


def test_a_silent_receiver_is_not_waited_for_longer_than_the_limit(open_stack: Stack, receiver: Receiver) -> None:
    """The try ends and the next one comes."""
    receiver.silence = 2.0
    with stopped(open_stack) as deliverer:
        asked(open_stack.client(), receiver)
        open_stack.work_off()
        deliverer(post_seconds=0.3)
        receiver.wait(2)
        [row] = outbox(open_stack)
    assert row["attempt"] >= 2
    assert "did not arrive in time" in row["last_error"]


def test_it_is_given_up_after_the_last_try_or_when_the_receiver_is_gone(serve: Serve, receiver: Receiver) -> None:
    """Two tries by this setting; 410 says that there is no use."""
    receiver.statuses = [503]
    with serve(**allowing(receiver, webhook_tries=2)) as stack:
        asked(stack.client(), receiver)
        stack.work_off()
        [row] = settled(stack)
        assert (row["attempt"], row["last_error"]) == (2, "the address answered with status 503")
        receiver.statuses = [410]
        asked(stack.client(), receiver, seed=2)
        stack.work_off()
        assert [row["attempt"] for row in settled(stack)] == [2, 1]


def test_pauses_grow_and_spread() -> None:
    """From ten seconds to hours: eight tries take about eight hours, and no two receivers are hit in step."""
    patience = Patience()
    pauses = [patience.before(attempt) for attempt in range(1, 9)]
    assert pauses[-1] is None
    whole = [pause for pause in pauses if pause is not None]
    wanted = [10, 40, 160, 640, 2560, 10240, 14400]
    assert all(0.8 * mean <= pause <= 1.2 * mean for pause, mean in zip(whole, wanted, strict=True))
    assert len({patience.before(1) for _ in range(20)}) > 10
    assert Patience(tries=10_000).before(9_000)


# Many processes, and their deaths


def stopped(stack: Stack) -> _Deliverers:
    """Stop the service's own deliverer and give the means to start others."""
    return _Deliverers(stack)


class _Deliverers:
    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._started: list[Deliverer] = []

    def __enter__(self) -> Callable[..., None]:
        self._stack.app.state.deliverer.stop()
        return self._start

    def _start(self, **more: Any) -> None:
        service = self._stack.app.state.service
        outbox = WebhookStore(service.store.engine)
        self._started.append(Deliverer(service, outbox, service.poster, Patience(8, 0.2), **more))
        self._started[-1].start()

    def __exit__(self, *_: object) -> None:
        for deliverer in self._started:
            deliverer.stop()


def test_several_deliverers_share_the_work(open_stack: Stack, receiver: Receiver) -> None:
    """Twenty events, three deliverers: each event arrives once."""
    http = open_stack.client()
    with stopped(open_stack) as deliverer:
        made = {asked(http, receiver, seed=seed)["id"] for seed in range(20)}
        open_stack.work_off()
        for _ in range(3):
            deliverer()
        receiver.wait(20)
        settled(open_stack)
    assert sorted(json.loads(call.body)["id"] for call in receiver.calls) == sorted(made)


SENDER = """
import sys
from impasto.api.app import create_app
from impasto.config import Settings
from impasto.jobs.database import open_database
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore
import pathlib, time, json
settings = Settings(**json.loads(sys.argv[1]))
engine = open_database(settings.database)
store = JobStore(engine)
app = create_app(settings, store, KeyStore(engine), OutputStore(settings.output_root))
app.state.deliverer.start()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_killed_while_it_sends_loses_nothing(open_stack: Stack, receiver: Receiver) -> None:
    """The job ends while nobody delivers; one process dies with the event in its hands, the next delivers it."""
    receiver.silence = 30.0
    settings = {"data_dir": str(open_stack.settings.data_dir), **allowing(receiver)}
    with stopped(open_stack) as deliverer:
        asked(open_stack.client(), receiver)
        open_stack.work_off()
        assert [row["delivered_at"] for row in outbox(open_stack)] == [None]
        sender = subprocess.Popen([sys.executable, "-c", SENDER, json.dumps(settings)], stdout=subprocess.PIPE)
        with sender:
            receiver.wait(1, seconds=30)
            os.kill(sender.pid, signal.SIGKILL)
        receiver.silence = 0.0
        release(open_stack)
        deliverer()
        first, second = receiver.wait(2)
        settled(open_stack)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


def release(stack: Stack) -> None:
    """Let the dead process's lease be over, which takes half a minute."""
    with stack.store.engine.begin() as db:
        assert db.execute(text("update webhooks set lease_until = 0 where lease_until is not null")).rowcount == 1


# Where nothing is sent


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://hooks.example/x", "must be https"),
        ("ftp://hooks.example/x", "must be https"),
        ("https://127.0.0.1/x", "could not be reached: give a public address"),
        ("https://localhost/x", "could not be reached"),
        ("https://api.localhost./x", "could not be reached"),
        ("https://[::1]/x", "could not be reached"),
        ("https://[::ffff:10.0.0.1]/x", "could not be reached"),
        ("https://169.254.169.254/latest/meta-data", "could not be reached"),
        ("https://10.0.0.1/x", "could not be reached"),
        ("https://hooks.example:22/x", "has port 22"),
        ("https://u:p@hooks.example/x", "has a user name"),
        ("hooks.example", "is no whole web address"),
        ("https://" + "a" * 5000, "is no whole web address"),
    ],
)
def test_an_address_that_is_not_open_to_all_is_refused_at_once(http: httpx.Client, address: str, words: str) -> None:
    """With the settings as they come; the same answer for every private place."""
    for answer in (
        http.post(f"/api/v3/{MODEL}", params={"webhook": address}, json={"prompt": "x"}),
        http.post(f"/api/v3/{MODEL}", json={"prompt": "x", "webhook": address}),
    ):
        message = refusal(answer, 400)
        assert '"/webhook"' in message
        assert words in message


def test_a_name_that_stands_for_a_private_address_is_never_dialled(serve: Serve, receiver: Receiver) -> None:
    """A name is resolved when it is dialled, and what it stands for is checked then. The same setting but for the
    allowed block delivers, in the other tests."""
    with serve(webhook_http=True, webhook_ports=[receiver.port], webhook_tries=1) as stack:
        answer = stack.client().post(
            f"/api/v3/{MODEL}", json={"prompt": "x", "webhook": f"http://ip6-localhost:{receiver.port}/"}
        )
        assert answer.status_code == 200, answer.text
        stack.work_off()
        [row] = settled(stack)
    assert "could not be reached" in row["last_error"]
    assert receiver.calls == []


def test_a_server_that_calls_nobody_says_so(serve: Serve) -> None:
    """``offline`` counts for webhooks as well."""
    with serve(offline=True) as stack:
        answer = stack.client().post(f"/api/v3/{MODEL}", json={"prompt": "x", "webhook": "https://hooks.example/"})
    assert "this server makes none" in refusal(answer, 400)


def test_base64_does_not_go_with_a_webhook(http: httpx.Client) -> None:
    """In the hosted service's words, under both keys."""
    body = {"prompt": "x", "enable_base64_output": True}
    answer = http.post(f"/api/v3/{MODEL}?webhook=https%3A%2F%2Fhooks.example%2F", json=body)
    words = "webhook callback does not support base64 output, please use the normal API to use base64 output"
    assert refusal(answer, 400) == words
    assert http.post(f"/api/v3/{MODEL}?webhook=", json=body).status_code == 200


def test_an_address_of_the_wrong_type(http: httpx.Client) -> None:
    """Named by its key."""
    message = refusal(http.post(f"/api/v3/{MODEL}", json={"prompt": "x", "webhook_url": 7}), 400)
    assert message == 'invalid request body, Error at "/webhook_url": must be a string, got 7'
