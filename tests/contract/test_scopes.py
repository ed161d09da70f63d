"""What a key may do over the wire: its scopes, its end, and nothing of any other key's, on every route there is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import text

from impasto.api.app import create_app
from impasto.api.auth import needed_scope
from impasto.config import Settings
from impasto.jobs.database import open_database, upgrade, writing
from impasto.jobs.keys import KeyStore, Scope
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore

from .conftest import MODEL, Stack, picture, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]
UNKNOWN = "0" * 32
BODY = {"prompt": "a red fox", "size": "512*512"}
V3 = "/api/v3"


def routes(app: Any) -> list[tuple[str, str]]:
    """Every method and path of the application, hidden ones too."""
    found = []
    for mounted in app.routes:
        for route in getattr(getattr(mounted, "original_router", None), "routes", [mounted]):
            if isinstance(route, APIRoute):
                found += [(method, route.path) for method in sorted(route.methods)]
    return found


@pytest.fixture(scope="module")
def all_routes(stack: Stack) -> list[tuple[str, str]]:
    """Those of the running service."""
    return routes(stack.app)


# Scopes

OPEN = {  # need no key: probes, the page, and addresses that are secrets themselves
    ("GET", "/healthz"), ("GET", "/health"), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/"),
    ("GET", "/static/server.json"), ("GET", "/static/{name}"), ("GET", "/outputs/{blob:path}"),
    ("HEAD", "/outputs/{blob:path}"), ("GET", "/uploads/{name}"), ("HEAD", "/uploads/{name}"),
    ("PUT", "/api/v2/media/uploads/{ticket}"), ("PUT", "/api/v3/media/uploads/{ticket}"),
}  # fmt: skip
READ = {
    "GET /predictions/{prediction_id}", "GET /predictions/{prediction_id}/result",
    "GET /predictions/{prediction_id}/events", "POST /predictions", "POST /billings/search", "POST /user/usage_stats",
}  # fmt: skip
ANY = {
    "GET /models", "GET /models/{name:path}", "POST /model/pricing", "POST /model/price", "GET /balance",
    "GET /account/balance", "GET /billing/balance",
}  # fmt: skip


def test_every_route_needs_a_key_or_is_known_to_need_none(stack: Stack, all_routes: list[tuple[str, str]]) -> None:
    """A route that somebody adds and forgets to close is found here."""
    client = stack.client(key="")
    for method, path in all_routes:
        filled = path.replace("{prediction_id}", UNKNOWN).replace("{path:path}", "x").replace("{name:path}", "sdxl")
        closed = client.request(method, filled).status_code == 401
        assert closed != ((method, path) in OPEN), (method, path)


def test_every_route_needs_the_scope_that_the_documents_say(all_routes: list[tuple[str, str]]) -> None:
    """To ask needs ``read``, some questions need nothing, and all else needs ``generate``."""
    seen = set()
    for method, path in set(all_routes) - OPEN:
        name = f"{method} {path.removeprefix('/api/v2').removeprefix('/api/v3').removeprefix('/v1')}"
        seen.add(name)
        if "/{path:path}" in path:
            continue
        wanted = Scope.READ if name in READ else None if name in ANY else Scope.GENERATE
        assert needed_scope(method, path) is wanted, name
    assert seen >= READ | ANY
    assert needed_scope("GET", "/metrics") is Scope.METRICS


def test_a_key_that_may_only_read_makes_nothing(stack: Stack) -> None:
    """403 in the body that every client understands; what it may do, it does."""
    reader = stack.client(stack.keys.create("reader", scopes=[Scope.READ]))
    said = refusal(reader.post(f"{V3}/{MODEL}", json=BODY), 403)
    assert "lacks the scope 'generate'" in said
    assert reader.post(f"{V3}/predictions").status_code == 200
    for method, path in (
        ("POST", f"{V3}/media/uploads"),
        ("DELETE", f"{V3}/predictions/{UNKNOWN}"),
        ("POST", f"{V3}/predictions/delete"),
        ("GET", f"{V3}/webhook/secret"),
    ):
        refusal(reader.request(method, path, json={}), 403)
    answer = reader.post("/v1/images/generations", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "invalid_request_error")


def test_a_key_that_may_only_generate_reads_nothing(stack: Stack) -> None:
    """Such as one in a program that others can look into, whose results go to a webhook."""
    writer = stack.client(stack.keys.create("writer", scopes=[Scope.GENERATE]))
    made = submit(writer)
    refusal(writer.get(made["urls"]["get"]), 403)
    refusal(writer.post(f"{V3}/predictions"), 403)
    assert writer.get(f"{V3}/models").status_code == 200
    assert writer.get(f"{V3}/balance").status_code == 200
    assert writer.delete(f"{V3}/predictions/{made['id']}").status_code == 200


def test_metrics_behind_a_key_need_their_scope(serve: Serve) -> None:
    """A scraper's key reads numbers and nobody's pictures."""
    with serve(metrics="key") as stack:
        scraper = stack.client(stack.keys.create("scraper", scopes=[Scope.METRICS]))
        assert scraper.get("/metrics").status_code == 200
        refusal(scraper.post(f"{V3}/predictions"), 403)
        refusal(stack.client(stack.keys.create("app", scopes=[Scope.READ])).get("/metrics"), 403)


# The end of a key


def test_an_expired_key_is_like_an_unknown_one(serve: Serve) -> None:
    """401; a submit at once, even where this process still remembers it as good."""
    with serve() as stack:
        guest = stack.client(stack.keys.create("guest", lifetime=3600))
        submit(guest)
        with writing(stack.store.engine) as db:
            db.execute(text("update keys set expires_at = 1 where name = 'guest'"))
        assert "expired" in refusal(guest.post(f"{V3}/{MODEL}", json=BODY), 401)
        fresh = stack.client(stack.keys.create("other", lifetime=0.001))
        assert "unknown, revoked or expired API key" in refusal(fresh.get(f"{V3}/balance"), 401)


# Tenants: alice has things, bob knows their ids


@pytest.fixture(scope="module")
def alice(stack: Stack) -> dict[str, Any]:
    """A job of each kind, a file, and the client that owns them."""
    client = stack.client()
    finished = submit(client)
    stack.work_off()
    file = {"file": ("alice.png", picture(64, 64, 1), "image/png")}
    upload = client.post(f"{V3}/media/upload/binary", files=file).json()["data"]
    return {"client": client, "waiting": submit(client)["id"], "finished": finished["id"], "upload": upload}


@pytest.fixture(scope="module")
def bob(stack: Stack) -> httpx.Client:
    """Somebody else."""
    return stack.client(stack.keys.create("bob"))


# How each route that is told an id is asked, with {id} in place of it; the rest are in ``WITHOUT_IDS``.
WITH_IDS = {
    "GET /predictions/{prediction_id}": None,
    "GET /predictions/{prediction_id}/result": None,
    "GET /predictions/{prediction_id}/events": None,
    "DELETE /predictions/{prediction_id}": None,
    "POST /predictions/{prediction_id}/cancel": None,
    "POST /predictions/delete": {"ids": ["{id}"]},
}
WITHOUT_IDS = {  # each has a promise below, or knows nothing of keys
    *ANY, "POST /predictions", "POST /billings/search", "POST /user/usage_stats", "GET /webhook/secret",
    "POST /media/uploads", "POST /media/upload/binary", "POST /images/generations", "POST /images/edits",
    *(f"POST /{model}" for model in (MODEL, "wavespeed-ai/sdxl", "stability-ai/sdxl-lora", "stability-ai/sdxl")),
    f"POST /{MODEL}/image-to-video",
}  # fmt: skip


def test_every_route_has_a_promise_about_tenants(all_routes: list[tuple[str, str]]) -> None:
    """A new route must be put into one of the two tables above."""
    for method, path in set(all_routes) - OPEN:
        name = f"{method} {path.removeprefix('/api/v2').removeprefix('/api/v3').removeprefix('/v1')}"
        assert name in WITH_IDS or name in WITHOUT_IDS or "/{path:path}" in name, name


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("which", ["waiting", "finished"])
@pytest.mark.parametrize("route", WITH_IDS)
def test_another_keys_id_is_like_one_that_never_was(
    stack: Stack, alice: dict[str, Any], bob: httpx.Client, route: str, which: str, version: str
) -> None:
    """Status, body and headers are the same to the byte, and nothing happens to the job."""
    method, path = route.split(" ")

    def ask(job_id: str) -> httpx.Response:
        body = WITH_IDS[route]
        filled = body and {name: [job_id for _ in value] for name, value in body.items()}
        return bob.request(method, f"/api/{version}{path.replace('{prediction_id}', job_id)}", json=filled)

    before = stack.store.get(alice[which])
    known, unknown = ask(alice[which]), ask(UNKNOWN)
    assert known.status_code == unknown.status_code == (404 if "{prediction_id}" in route else 200)
    assert known.content == unknown.content
    changing = {"date", "x-request-id"}
    assert {k: v for k, v in known.headers.items() if k not in changing} == {
        k: v for k, v in unknown.headers.items() if k not in changing
    }
    assert stack.store.get(alice[which]) == before


def test_the_owner_reaches_them_all(alice: dict[str, Any]) -> None:
    """Else the test above would pass with routes that find nothing for anybody."""
    client = alice["client"]
    for path in ("", "/result"):
        assert client.get(f"{V3}/predictions/{alice['finished']}{path}").status_code == 200
    with client.stream("GET", f"{V3}/predictions/{alice['finished']}/events") as events:
        assert events.status_code == 200


def test_lists_and_counts_hold_only_ones_own(alice: dict[str, Any], bob: httpx.Client) -> None:
    """Two keys, two pasts."""
    for version in ("v2", "v3"):
        assert bob.post(f"/api/{version}/predictions").json()["data"]["total"] == 0
        usage = bob.post(f"/api/{version}/user/usage_stats").json()["data"]
        assert usage["summary"]["total_requests"] == 0
        assert alice["client"].post(f"/api/{version}/predictions").json()["data"]["total"] >= 2


def test_webhook_secrets_differ(alice: dict[str, Any], bob: httpx.Client) -> None:
    """Nobody can sign in another's name."""
    mine = bob.get(f"{V3}/webhook/secret").json()["data"]["secret"]
    assert alice["client"].get(f"{V3}/webhook/secret").json()["data"]["secret"] != mine


def test_an_idempotency_key_is_ones_own(stack: Stack) -> None:
    """The same text from another key is another job, in both dialects' submits."""
    carol, dave = stack.client(stack.new_key()), stack.client(stack.new_key())
    ids = {
        client.post(f"{V3}/{MODEL}", json=BODY, headers={"Idempotency-Key": "order-1"}).json()["data"]["id"]
        for client in (carol, dave, carol)
    }
    assert len(ids) == 2


def test_a_dropped_request_is_found_again_by_its_own_key_alone(stack: Stack) -> None:
    """The same body from another key joins nobody's job."""
    carol, dave = stack.client(stack.new_key()), stack.client(stack.new_key())
    first = submit(carol, prompt="a lamp")
    stack.store.drop(first["id"])
    assert submit(dave, prompt="a lamp")["id"] != first["id"]
    assert submit(carol, prompt="a lamp")["id"] == first["id"]


def test_an_upload_is_named_as_a_lora_by_its_own_key_alone(stack: Stack, alice: dict[str, Any]) -> None:
    """A file's name finds files of one's own; its address, which is a secret, finds it for whoever was given that."""
    uploads = stack.app.state.service.uploads
    owner = stack.keys.authenticate(stack.key).id
    other = next(key.id for key in stack.keys.list() if key.id != owner)
    assert uploads.find_lora(other, "alice") is None
    assert httpx.get(alice["upload"]["download_url"], trust_env=False).status_code == 200
    guess = alice["upload"]["download_url"].rpartition("/")[0] + f"/{UNKNOWN}.png"
    assert httpx.get(guess, trust_env=False).status_code == 404


def test_an_application_without_a_key_check_would_be_found(tmp_path: Any) -> None:
    """The walk over the routes sees what is added to the application."""
    settings = Settings(data_dir=tmp_path)
    engine = open_database(settings.database)
    upgrade(engine)
    app = create_app(settings, JobStore(engine), KeyStore(engine), OutputStore(str(tmp_path / "out")))
    app.add_api_route("/open", lambda: None, methods=["GET"], include_in_schema=False)
    assert ("GET", "/open") in routes(app)
    engine.dispose()
