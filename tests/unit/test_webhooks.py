"""The outbox, the signatures and the POST: what holds whatever stands around them."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook

from impasto.api.delivery import signature
from impasto.errors import NotFound
from impasto.fetch.addresses import Policy
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from impasto.fetch.post import Poster
from impasto.jobs.database import reading, writing
from impasto.jobs.records import NewJob
from impasto.jobs.webhooks import WebhookStore
from tests.receiver import Receiver, receiving

DOCS = Path(__file__).parents[2] / "docs" / "webhooks.md"
# The vectors of docs/webhooks.md.
SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
EVENT, MOMENT, BODY = "msg_00112233445566778899aabbccddeeff", 1767323045, b'{"id":"0","status":"completed"}'


@pytest.fixture
def outbox(store) -> WebhookStore:
    """The events of the store's database."""
    return WebhookStore(store.engine)


def ended_job(store, key_id: str, webhook_url: str | None = "https://hooks.example/") -> str:
    """A job that has failed, and whose event is due."""
    job = store.create(NewJob("m", {}, key_id, seed=1, webhook_url=webhook_url), 1000)
    [claimed] = store.claim("worker", 1, 30.0)
    assert store.fail(claimed.lease, "no", "No")
    return job.id


# The outbox


def test_an_event_is_there_as_soon_as_its_job_has_ended_and_only_if_it_was_asked_for(store, outbox, alice):
    """Written in the same transaction: nobody reads the end of a job whose event could still be lost."""
    ended_job(store, alice, webhook_url=None)
    told = ended_job(store, alice)
    [event] = outbox.claim(10, 30.0)
    assert (event.prediction_id, event.url, event.attempt) == (told, "https://hooks.example/", 1)
    assert event.id.startswith("msg_")


def test_a_transaction_that_fails_leaves_neither_end_nor_event(store, outbox, alice):
    """Both or none."""
    store.create(NewJob("m", {}, alice, seed=1, webhook_url="https://hooks.example/"), 1000)
    [job] = store.claim("worker", 1, 30.0)
    with writing(store.engine) as db:
        db.execute(text("alter table webhooks rename to webhooks_away"))
    with pytest.raises(Exception, match=r"webhooks|answer"):
        store.fail(job.lease, "no", "No")
    with writing(store.engine) as db:
        db.execute(text("alter table webhooks_away rename to webhooks"))
    assert store.get(job.id).status == "processing"
    assert store.fail(job.lease, "no", "No")
    assert len(outbox.claim(10, 30.0)) == 1


def test_an_event_in_somebodys_hands_is_given_to_nobody_else_until_its_lease_ends(store, outbox, alice):
    """Then it comes again, with the same id, and whoever was late can write no more."""
    ended_job(store, alice)
    [first] = outbox.claim(10, 0.15)
    assert outbox.claim(10, 0.15) == []
    time.sleep(0.2)
    [second] = outbox.claim(10, 30.0)
    assert (second.id, second.attempt) == (first.id, 2)
    outbox.give_up(first, "late")
    outbox.delivered(second)
    outbox.retry(second, 0.0, "too late as well")
    assert outbox.claim(10, 30.0) == []


def test_a_failed_try_comes_again_after_its_pause(store, outbox, alice):
    """Not before."""
    ended_job(store, alice)
    [event] = outbox.claim(1, 30.0)
    outbox.retry(event, 0.2, "no")
    assert outbox.claim(1, 30.0) == []
    time.sleep(0.25)
    assert [again.attempt for again in outbox.claim(1, 30.0)] == [2]


def test_keys_take_turns(store, outbox, alice, bob):
    """A key with a hundred events does not hold up another's one."""
    for _ in range(10):
        ended_job(store, alice)
    lonely = ended_job(store, bob)
    assert lonely in [event.prediction_id for event in outbox.claim(2, 30.0)]
    assert len(outbox.claim(20, 30.0)) == 9


# Secrets


def test_a_secret_is_made_once_whoever_asks(keys, alice, bob):
    """By id or by name; another only when it is rotated."""
    first = keys.webhook_secret(alice)
    assert first == keys.webhook_secret(alice) == keys.named_webhook_secret("alice")
    assert first != keys.webhook_secret(bob)
    rotated = keys.named_webhook_secret("alice", rotate=True)
    assert rotated != first
    assert keys.webhook_secret(alice) == rotated
    for ask in (lambda: keys.webhook_secret("nobody"), lambda: keys.named_webhook_secret("nobody", rotate=True)):
        with pytest.raises(NotFound):
            ask()


# Signatures


def test_the_vectors_of_the_docs():
    """Worked out here a second time, from the documents' words."""
    message = f"{EVENT}.{MOMENT}.".encode() + BODY
    v3 = hmac.new(SECRET[6:].encode(), message, hashlib.sha256).hexdigest()
    assert signature("v3", SECRET, EVENT, MOMENT, BODY) == f"v3,{v3}"
    standard = signature("standard", SECRET, EVENT, MOMENT, BODY)
    assert signature("both", SECRET, EVENT, MOMENT, BODY) == f"v3,{v3} {standard}"
    documented = DOCS.read_text()
    for shown in (SECRET, EVENT, str(MOMENT), BODY.decode(), v3, standard):
        assert f"`{shown}`" in documented


def test_the_receiver_in_the_docs_accepts_what_we_sign_and_nothing_else():
    """The Python example is run as it stands."""
    code = DOCS.read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "webhooks.md", "exec"), names)
    moment = int(time.time())
    for kind in ("v3", "both"):
        headers = {
            "webhook-id": EVENT,
            "webhook-timestamp": str(moment),
            "webhook-signature": signature(kind, SECRET, EVENT, moment, BODY),
        }
        assert names["verify"](SECRET, headers, BODY)
        assert not names["verify"](SECRET, headers, BODY + b" ")
        assert not names["verify"](SECRET.replace("A", "B"), headers, BODY)
        assert not names["verify"](SECRET, headers | {"webhook-timestamp": str(moment - 400)}, BODY)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_javascript_in_the_docs_does_the_same():
    """The example is run as it stands."""
    code = DOCS.read_text().split("```js\n")[1].split("```")[0]
    moment = int(time.time())
    headers = {"webhook-id": EVENT, "webhook-timestamp": str(moment)}
    headers["webhook-signature"] = signature("both", SECRET, EVENT, moment, BODY)
    cases = [(SECRET, moment, BODY), (SECRET, moment, BODY + b" "), (SECRET[:-2], moment, BODY), (SECRET, 5, BODY)]
    for secret, when, body in cases:
        sent = json.dumps([secret, headers | {"webhook-timestamp": str(when)}, body.decode()])
        code += f"\n{{ const [s, h, b] = {sent}; console.log(verify(s, h, Buffer.from(b))); }}"
    said = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=30, check=True).stdout
    assert said.split() == ["true", "false", "false", "false"]


def test_the_secret_fits_the_standard_library(keys, alice):
    """Its base64 is a key of 256 bits."""
    secret = keys.webhook_secret(alice)
    headers = {"webhook-id": EVENT, "webhook-timestamp": str(int(time.time()))}
    headers["webhook-signature"] = signature("standard", secret, EVENT, int(headers["webhook-timestamp"]), BODY)
    assert Webhook(secret).verify(BODY, headers) == {"id": "0", "status": "completed"}
    assert len(Webhook(secret)._whsecret) == 32


# The POST


@pytest.fixture
def receiver():
    with receiving() as listening:
        yield listening


def poster(receiver: Receiver, *allow: str) -> Poster:
    """One whose every name stands for the loopback interface."""
    policy = Policy.of(allow, allow_http=True, ports=[receiver.port], setting="webhook_allow")
    return Poster(policy, resolver=lambda host, port: ["127.0.0.1"])


def test_a_name_that_stands_for_a_private_address_is_not_dialled_unless_it_is_allowed(receiver):
    """The control: with the block or the name allowed, the same POST arrives."""
    url = f"http://hooks.example:{receiver.port}/a?b=c"
    with pytest.raises(FetchFailed, match="could not be reached"):
        poster(receiver).post(url, b"{}", {}, Clock(5))
    assert receiver.calls == []
    for allowed in ("127.0.0.0/8", "hooks.example"):
        assert poster(receiver, allowed).post(url, b"{}", {"x-a": "1"}, Clock(5)) == 200
    [first, _] = receiver.calls
    assert (first.path, first.body, first.headers["x-a"]) == ("/a?b=c", b"{}", "1")
    assert first.headers["host"] == f"hooks.example:{receiver.port}"
    assert first.headers["user-agent"].startswith("impasto/")


def test_an_answer_is_its_status_alone(receiver):
    """A redirect is not followed, and nobody's silence is waited for."""
    receiver.statuses = [302, 200]
    url = f"http://127.0.0.1:{receiver.port}/"
    assert poster(receiver, "127.0.0.1").post(url, b"{}", {}, Clock(5)) == 302
    assert len(receiver.calls) == 1
    receiver.silence = 3.0
    began = time.monotonic()
    with pytest.raises(FetchFailed):
        poster(receiver, "127.0.0.1").post(url, b"{}", {}, Clock(0.3))
    assert time.monotonic() - began < 1.5


def test_statements_of_the_outbox_leave_a_trace(store, outbox, alice):
    """What went wrong can be read, cut to a sensible length."""
    ended_job(store, alice)
    [event] = outbox.claim(1, 30.0)
    outbox.give_up(event, "x" * 10_000)
    with reading(store.engine) as db:
        [row] = db.execute(text("select last_error, given_up_at from webhooks")).all()
    assert len(row.last_error) == 500
    assert row.given_up_at
