"""Request ids, logs and the audit log: enough to find out what happened, and nothing that a client wrote."""

from __future__ import annotations

import base64
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from impasto.audit import AuditLog, hashed
from impasto.errors import ConfigError
from impasto.jobs.keys import Scope
from impasto.logs import FORMAT, JsonFormatter, TextFormatter, begin_facts, note

from .conftest import MODEL, Stack, picture, submit

Serve = Callable[..., AbstractContextManager[Stack]]
SUBMIT = f"/api/v3/{MODEL}"
SENTINEL = "sentinel-7f3a"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the service logs as JSON, line by line."""
    written: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    handler = Kept()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("impasto")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(before)


# Request ids


def test_every_answer_has_an_id_of_its_own(stack: Stack) -> None:
    """Good answers, refusals, and what is nowhere."""
    client = stack.client()
    answers = [client.get("/healthz"), client.get("/api/v3/balance"), client.get("/nowhere"), client.post(SUBMIT)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 4
    assert all(len(name) == 32 for name in ids)


def test_a_clients_own_id_comes_back(stack: Stack) -> None:
    """So that both sides' logs can be put side by side."""
    answer = stack.client().get("/healthz", headers={"X-Request-Id": "order-7.a_B"})
    assert answer.headers.get_list("x-request-id") == ["order-7.a_B"]


@pytest.mark.parametrize("sent", ["", "a b", "a;b", "-x", "a" * 101, "ä", "a\tb", '"'])
def test_what_is_no_id_is_replaced(stack: Stack, sent: str) -> None:
    """It would be written into logs as it is."""
    answer = stack.client().get("/healthz", headers=[(b"X-Request-Id", sent.encode("latin-1"))])
    assert answer.headers["x-request-id"] != sent
    assert len(answer.headers["x-request-id"]) == 32


def test_a_fault_of_ours_has_the_id_too(serve: Serve, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """It is then that somebody asks for it; the log has it beside the fault."""
    with serve() as stack:

        def broken(*_: object) -> None:
            raise RuntimeError("a fault")

        monkeypatch.setattr(stack.store, "cancel", broken)
        answer = stack.client().delete(f"/api/v3/predictions/{'0' * 32}", headers={"X-Request-Id": "find-me"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "find-me")
        assert [json.loads(line)["request_id"] for line in lines if "RuntimeError" in line] == ["find-me"]


# Logs


def test_a_submit_is_in_the_log_with_its_request_and_its_prediction(stack: Stack, lines: list[str]) -> None:
    """One line; polls are there at the level of debugging."""
    client = stack.client()
    client.headers["X-Request-Id"] = "find-me"
    made = submit(client)
    client.get(made["urls"]["get"])
    entries = [json.loads(line) for line in lines if "impasto.api.tracing" in line]
    key = stack.keys.authenticate(stack.key).id
    told = {"request_id": "find-me", "prediction_id": made["id"], "key_id": key}
    assert [{name: entry[name] for name in told} for entry in entries] == [told, told]
    assert [entry["level"] for entry in entries] == ["info", "debug"]
    assert entries[0]["message"].startswith(f"POST {SUBMIT} 200 ")
    assert entries[1]["message"].startswith("GET /api/v3/predictions/{prediction_id}/result 200 ")


def record(message: str, **values: Any) -> logging.LogRecord:
    return logging.LogRecord("impasto.x", logging.WARNING, __file__, 1, message, (), **{"exc_info": None, **values})


def test_text_lines_end_with_what_is_known_of_the_request() -> None:
    """And have nothing more outside of one."""
    import contextvars

    def in_a_request() -> str:
        begin_facts({"request_id": "r1"})
        note(prediction_id="p1", loras=["not told"])
        return TextFormatter(FORMAT).format(record("a thing"))

    assert (
        contextvars.Context().run(in_a_request).endswith("WARNING impasto.x: a thing [request_id=r1 prediction_id=p1]")
    )
    note(prediction_id="of no request")
    assert TextFormatter(FORMAT).format(record("a thing")).endswith("WARNING impasto.x: a thing")


def test_json_lines_are_one_line_each_and_hold_no_secret() -> None:
    """A trace with line breaks, and a token in a message."""
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        shown = record("got Bearer abcdef", exc_info=(ValueError, error, error.__traceback__))
    line = JsonFormatter().format(shown)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("warning", "impasto.x", "got Bearer [redacted]")
    assert "first\nsecond" in entry["trace"]


# The audit log


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_audit_log_tells_who_did_what(serve: Serve, tmp_path: Path) -> None:
    """Submits, cancels, deletes, uploads and refused keys; polls are not in it."""
    path = tmp_path / "logs" / "audit.jsonl"
    with serve(audit_log=path) as stack:
        client = stack.client()
        key = stack.keys.authenticate(stack.key).id
        made = submit(client, num_images=2, loras=[{"path": "owner/ink", "scale": 1}])
        client.get(made["urls"]["get"])
        client.delete(f"/api/v3/predictions/{made['id']}")
        client.post("/api/v3/predictions/delete", json={"ids": [made["id"], "not an id"]})
        client.post(SUBMIT, json={})
        stack.client("wrong").get(made["urls"]["get"])
        stack.client(stack.keys.create("reader", scopes=[Scope.READ])).post(SUBMIT, json={})
    written = entries(path)
    assert [(entry["method"], entry["status"]) for entry in written] == [
        ("POST", 200), ("DELETE", 200), ("POST", 200), ("POST", 400), ("GET", 401), ("POST", 403),
    ]  # fmt: skip
    first = written[0]
    assert {name: first[name] for name in ("key_id", "prediction_id", "cost", "loras", "route")} == {
        "key_id": key,
        "prediction_id": made["id"],
        "cost": 0.5,
        "loras": hashed(["owner/ink"]),
        "route": SUBMIT,
    }
    assert first["time"].endswith("+00:00")
    assert written[1]["prediction_id"] == made["id"]
    assert written[2]["prediction_ids"] == [made["id"]]
    assert "key_id" not in written[4]
    assert len({entry["request_id"] for entry in written}) == len(written)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_that_a_client_wrote_is_in_the_audit_log_or_the_log(
    serve: Serve, tmp_path: Path, lines: list[str]
) -> None:
    """A word in every place where a client can put one, a key and a picture: none of them is found again."""
    path = tmp_path / "audit.jsonl"
    image = base64.b64encode(picture(64, 64, 12345)).decode()
    with serve(audit_log=path, webhook_allow=["127.0.0.1"], webhook_http=True, webhook_ports=[9]) as stack:
        client = stack.client()
        body = {
            "prompt": SENTINEL, "negative_prompt": SENTINEL, "image": image, SENTINEL: SENTINEL,
            "loras": [{"path": f"{SENTINEL}/{SENTINEL}", "scale": 1}], "size": "512*512",
        }  # fmt: skip
        hook = f"http://127.0.0.1:9/{SENTINEL}"
        headers = {"Idempotency-Key": SENTINEL, "User-Agent": SENTINEL, "X-Request-Id": f"{SENTINEL} not an id"}
        assert client.post(SUBMIT, json=body, params={"webhook": hook}, headers=headers).status_code == 200
        client.post(SUBMIT, json=body | {"size": SENTINEL})
        client.post(f"/api/v3/{SENTINEL}", json=body)
        client.delete(f"/api/v3/predictions/{SENTINEL}")
        client.post("/api/v3/predictions/delete", json={"ids": [SENTINEL]})
        client.post("/api/v3/media/upload/binary", files={"file": (f"{SENTINEL}.png", picture(9, 9, 1), "image/png")})
        client.post("/v1/images/generations", json={"prompt": SENTINEL, "model": SENTINEL})
        stack.client(SENTINEL).post(SUBMIT, json=body)
        key = stack.key
    assert len(entries(path)) == 8
    for written in (path.read_text(), "\n".join(lines)):
        assert SENTINEL.lower() not in written.lower()
        assert key not in written
        assert image[:40] not in written
        assert "127.0.0.1" not in written


def test_the_audit_log_goes_on_in_a_new_file_when_the_old_one_is_moved(tmp_path: Path) -> None:
    """A rotation needs no signal."""
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.write({"n": 1})
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit.jsonl.1")
    audit.write({"n": 2})
    assert [entry["n"] for entry in entries(tmp_path / "audit.jsonl")] == [2]


def test_an_audit_log_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    """Somebody relies on it; later, a full disk stops nothing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="audit_log"):
        AuditLog(tmp_path / "file" / "audit.jsonl")


def test_a_full_disk_under_the_audit_log_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    AuditLog(Path("/dev/full")).write({"n": 1})
    assert "audit log cannot be written" in caplog.text
