"""A key's predictions over the wire: listed, deleted, cancelled."""

from __future__ import annotations

import base64
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import MODEL, Stack, picture, read, refusal, submit

LIST = "/api/v3/predictions"


def listed(client: httpx.Client, version: str = "v3", **body: Any) -> dict[str, Any]:
    """A page."""
    answer = client.post(f"/api/{version}/predictions", json=body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["code"], answer.json()["message"]) == (200, "success")
    return answer.json()["data"]


def ids(page: dict[str, Any]) -> list[str]:
    return [item["id"] for item in page["items"]]


@pytest.fixture
def owner(stack: Stack) -> httpx.Client:
    """A client with a key that has no predictions."""
    return stack.client(stack.new_key())


# Listing


def test_a_list_has_the_newest_first_and_only_the_callers(stack: Stack, owner: httpx.Client) -> None:
    """Each item is the prediction as it reads alone, with what was sent."""
    submit(stack.client(stack.new_key()))
    made = []
    for seed in range(3):
        made.append(submit(owner, prompt=f"fox {seed}", seed=seed))
        time.sleep(0.002)
    stack.work_off()
    for version in ("v3", "v2"):
        page = listed(owner, version)
        assert (page["page"], page["page_size"], page["total"], page["has_more"]) == (1, 20, 3, False)
        assert ids(page) == [prediction["id"] for prediction in reversed(made)]
    for item, prediction in zip(listed(owner)["items"], reversed(made), strict=True):
        inputs = item.pop("inputs")
        assert item == read(owner, prediction)
        assert inputs == {"prompt": f"fox {prediction['seed']}", "size": "512*512", "seed": prediction["seed"]}
    assert all("inputs" not in item for item in listed(owner, include_inputs=False)["items"])


def test_pages_cover_everything_once(owner: httpx.Client) -> None:
    """In order, and a page behind the last is empty."""
    made = [submit(owner)["id"] for _ in range(5)]
    pages = [listed(owner, page=page, page_size=2) for page in (1, 2, 3, 4)]
    assert [page["has_more"] for page in pages] == [True, True, False, False]
    assert [len(page["items"]) for page in pages] == [2, 2, 1, 0]
    assert sorted(id for page in pages for id in ids(page)) == sorted(made)
    assert {page["total"] for page in pages} == {5}


def test_nothing_asked_for_is_everything(owner: httpx.Client) -> None:
    """No body, an empty one, nulls and empty texts, as tools send them."""
    made = submit(owner)["id"]
    for body in (b"", b"{}", b'{"model":"","status":"","created_after":"","page":null,"include_inputs":null}'):
        answer = owner.post(LIST, content=body)
        assert ids(answer.json()["data"]) == [made]


def test_a_list_is_cut_by_model_status_and_time(stack: Stack, owner: httpx.Client) -> None:
    """Each on its own and together; cancelled ones are among the failed, as they are shown."""
    done, waiting = submit(owner), submit(owner, model="wavespeed-ai/sdxl")
    for job in stack.claim():
        if job.id == done["id"]:
            stack.complete(job)
        else:
            stack.store.release(job.lease)
    stopped = submit(owner)
    owner.post(f"{LIST}/{stopped['id']}/cancel")
    found = {status: ids(listed(owner, status=status)) for status in ("completed", "created", "failed", "cancelled")}
    assert found["completed"] == [done["id"]]
    assert found["created"] == [waiting["id"]]
    assert found["failed"] == found["cancelled"] == [stopped["id"]]
    assert ids(listed(owner, status="processing")) == []
    assert ids(listed(owner, model="wavespeed-ai/sdxl")) == [waiting["id"]]
    assert set(ids(listed(owner, model=MODEL))) == {done["id"], stopped["id"]}
    assert ids(listed(owner, model=MODEL, status="completed")) == [done["id"]]
    assert ids(listed(owner, model="no/such")) == []


def test_times_are_taken_in_every_offset_and_to_the_millisecond(owner: httpx.Client) -> None:
    """From the one, up to but without the other."""
    prediction = submit(owner)
    made = datetime.fromisoformat(prediction["created_at"])
    later = made + timedelta(milliseconds=1)
    east = made.astimezone(UTC).replace(tzinfo=None) + timedelta(hours=5, minutes=30)
    assert ids(listed(owner, created_after=prediction["created_at"])) == [prediction["id"]]
    assert ids(listed(owner, created_after=f"{east.isoformat()}+05:30")) == [prediction["id"]]
    assert ids(listed(owner, created_after=later.isoformat())) == []
    assert ids(listed(owner, created_before=prediction["created_at"])) == []
    assert ids(listed(owner, created_before=later.isoformat())) == [prediction["id"]]
    assert ids(listed(owner, created_after="2020-01-01T00:00:00.123456789Z", created_before="9999-12-31")) != []


@pytest.mark.parametrize(
    ("body", "field", "problem"),
    [
        ({"page": 0}, "page", "must be between 1 and"),
        ({"page": 10**30}, "page", "must be between"),
        ({"page": "1"}, "page", "must be an integer"),
        ({"page_size": 101}, "page_size", "must be between 1 and 100"),
        ({"page_size": 0}, "page_size", "must be between 1 and 100"),
        ({"created_after": "yesterday"}, "created_after", "must be an RFC 3339 time, such as 2026-01-31T00:00:00Z"),
        ({"created_before": 1767225600}, "created_before", "must be a string"),
        ({"created_before": "0001-01-01T00:00:00+23:00"}, "created_before", "must be an RFC 3339 time"),
        ({"status": "lost"}, "status", "must be one of created, processing, completed, failed, cancelled"),
        ({"model": ["x"]}, "model", "must be a string"),
        ({"model": "a\0b"}, "model", "printable"),
        ({"include_inputs": "yes"}, "include_inputs", "must be true or false"),
    ],
)
def test_a_wrong_field_is_named(owner: httpx.Client, body: dict[str, Any], field: str, problem: str) -> None:
    """400, as on every route."""
    message = refusal(owner.post(LIST, json=body), 400)
    assert message.startswith(f'invalid request body, Error at "/{field}": ')
    assert problem in message


def test_a_list_shows_addresses_where_base64_was_asked_for(stack: Stack, owner: httpx.Client) -> None:
    """A page of a hundred would be hundreds of megabytes; the address gives the same bytes."""
    submit(owner, enable_base64_output=True)
    stack.work_off()
    [item] = listed(owner)["items"]
    [url] = item["outputs"]
    assert httpx.get(url).content.startswith(b"\x89PNG")


def test_listing_needs_a_key(stack: Stack) -> None:
    """So do deleting and cancelling."""
    anybody = stack.client("")
    for method, path in (
        ("POST", ""),
        ("POST", "/delete"),
        ("POST", f"/{'0' * 32}/cancel"),
        ("DELETE", f"/{'0' * 32}"),
    ):
        refusal(anybody.request(method, LIST + path, json={}), 401)


# Deleting


def delete(client: httpx.Client, *job_ids: str) -> int:
    answer = client.post(f"{LIST}/delete", json={"ids": list(job_ids)})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["data"]["deleted_count"])


def files_of(stack: Stack, job_id: str) -> list[Path]:
    return [file for file in (Path(stack.settings.output_root) / job_id).rglob("*") if file.is_file()]


def test_a_deleted_prediction_is_gone_with_its_files(stack: Stack, owner: httpx.Client) -> None:
    """At once: reading, listing and fetching find nothing; another one stays."""
    gone, stays = submit(owner), submit(owner)
    stack.work_off()
    [url], [other] = (read(owner, prediction)["outputs"] for prediction in (gone, stays))
    assert delete(owner, gone["id"]) == 1
    refusal(owner.get(gone["urls"]["get"]), 404)
    refusal(httpx.get(url), 404)
    assert files_of(stack, gone["id"]) == []
    assert ids(listed(owner)) == [stays["id"]]
    assert listed(owner)["total"] == 1
    assert httpx.get(other).status_code == 200
    assert delete(owner, gone["id"]) == 0


def test_only_ones_own_predictions_count(stack: Stack, owner: httpx.Client) -> None:
    """Another key's, unknown ones, nonsense and the same one twice count nothing, and nothing happens to them."""
    theirs, mine = submit(stack.client()), submit(owner)
    assert delete(owner, theirs["id"], "0" * 32, "nonsense", "", mine["id"], mine["id"]) == 1
    assert read(stack.client(), theirs)["status"] == "created"
    assert delete(owner) == 0


def test_deleting_stops_what_waits_and_what_runs(stack: Stack, owner: httpx.Client) -> None:
    """A waiting one is never started and its start picture goes; a running one's worker is told to drop it."""
    stack.work_off()
    running = submit(owner)
    [job] = stack.claim()
    waiting = submit(owner, image=base64.b64encode(picture(64, 64, 1)).decode())
    [key] = stack.store.get(waiting["id"]).input["pictures"].values()
    assert (Path(stack.settings.output_root) / key).exists()
    assert delete(owner, running["id"], waiting["id"]) == 2
    assert stack.claim() == []
    assert not (Path(stack.settings.output_root) / key).exists()
    beat = stack.store.heartbeat("test-worker", {job.lease: {}}, 60)
    assert job.lease in beat.cancelled
    refusal(owner.get(running["urls"]["get"]), 404)


def test_the_same_request_after_deletion_is_a_new_one(owner: httpx.Client) -> None:
    """An idempotency key does not bring back what was deleted."""
    headers, body = {"Idempotency-Key": "one"}, {"prompt": "a fox"}
    first, again = (owner.post(f"/api/v3/{MODEL}", json=body, headers=headers).json()["data"]["id"] for _ in range(2))
    assert first == again
    delete(owner, first)
    new = owner.post(f"/api/v3/{MODEL}", json=body, headers=headers).json()["data"]
    assert new["id"] != first
    assert read(owner, new)["status"] == "created"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, '"/ids": property "ids" is missing'),
        ({"ids": "a"}, '"/ids": must be an array'),
        ({"ids": [1]}, '"/ids/0": must be a string'),
        ({"ids": ["x"] * 1001}, '"/ids": takes at most 1000 items'),
    ],
)
def test_a_wrong_deletion_is_refused(owner: httpx.Client, body: dict[str, Any], problem: str) -> None:
    """Before anything is deleted."""
    assert problem in refusal(owner.post(f"{LIST}/delete", json=body), 400)


# Cancelling


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("spelling", ["DELETE", "POST"])
def test_a_waiting_prediction_is_cancelled(stack: Stack, owner: httpx.Client, spelling: str, version: str) -> None:
    """Both spellings answer with the prediction, failed with a word that says why; nobody starts it."""
    stack.work_off()
    prediction = submit(owner)
    path = f"/api/{version}/predictions/{prediction['id']}"
    answer = owner.delete(path) if spelling == "DELETE" else owner.post(f"{path}/cancel")
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert (data["id"], data["status"], data["code"]) == (prediction["id"], "failed", 1405)
    assert data["error"].startswith("cancelled")
    assert stack.claim() == []
    assert read(owner, prediction)["status"] == "failed"


def test_a_running_prediction_ends_with_its_workers_next_word(stack: Stack, owner: httpx.Client) -> None:
    """Until then it runs; what the worker delivers later is not shown."""
    stack.work_off()
    prediction = submit(owner)
    [job] = stack.claim()
    assert owner.delete(f"{LIST}/{prediction['id']}").json()["data"]["status"] == "processing"
    assert job.lease in stack.store.heartbeat("test-worker", {job.lease: {}}, 60).cancelled
    shown = read(owner, prediction)
    assert (shown["status"], shown["code"], shown["outputs"]) == ("failed", 1405, [])


def test_an_ended_prediction_stays_as_it_is(stack: Stack, owner: httpx.Client) -> None:
    """Cancelling too late is no error and loses nothing."""
    prediction = submit(owner)
    stack.work_off()
    after = owner.delete(f"{LIST}/{prediction['id']}").json()["data"]
    assert after == read(owner, prediction)
    assert after["status"] == "completed"


def test_cancelling_what_is_not_ones_own_is_404(stack: Stack, owner: httpx.Client) -> None:
    """And nothing happens to it."""
    theirs = submit(stack.client())
    for path in (theirs["id"], "0" * 32, "nonsense"):
        refusal(owner.delete(f"{LIST}/{path}"), 404)
        refusal(owner.post(f"{LIST}/{path}/cancel"), 404)
    assert read(stack.client(), theirs)["status"] == "created"
