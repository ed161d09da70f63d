"""Refusals that are not about a field: keys, paths, methods, and our own faults."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from impasto import errors as our
from impasto.api import errors

from .conftest import MODEL, Stack, read, refusal, submit

PATHS = [
    ("POST", f"/api/v2/{MODEL}"),
    ("POST", "/api/v3/no/such-model"),
    ("GET", f"/api/v3/predictions/{'0' * 32}/result"),
]
BAD_KEYS = [None, "", "Bearer", "Bearer wrong", "Basic eDp5", "wrong", "Bearer \xe9"]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("header", BAD_KEYS)
def test_without_a_good_key_everything_is_401(stack: Stack, method: str, path: str, header: str | None) -> None:
    """The text says which header is expected; nothing else is told, not even whether the path exists."""
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = httpx.request(method, stack.url + path, headers=headers, json={"prompt": "x"}, trust_env=False)
    assert "Authorization: Bearer" in refusal(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}"])
def test_a_good_key_in_any_spelling(stack: Stack, form: str) -> None:
    """The scheme's case and stray whitespace around the key do not matter."""
    headers = {"Authorization": form.format(stack.key)}
    answer = httpx.post(f"{stack.url}/api/v3/{MODEL}", headers=headers, json={"prompt": "x"}, trust_env=False)
    assert answer.status_code == 200


def test_a_key_in_the_wrong_header_is_told_the_right_one(stack: Stack) -> None:
    """The most common mistake gets the answer that ends it."""
    answer = stack.client("", **{"X-API-Key": stack.key}).post(f"/api/v3/{MODEL}", json={"prompt": "x"})
    assert refusal(answer, 401) == 'missing API key: send the header "Authorization: Bearer <your key>"'


def test_a_revoked_key_ends_soon(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be remembered for a few seconds; after that it is refused. The clock is moved, not waited for."""
    secret = stack.keys.create("soon gone")
    client = stack.client(secret)
    data = submit(client)
    stack.keys.revoke("soon gone")
    monkeypatch.setattr("impasto.api.auth.time", SimpleNamespace(monotonic=lambda: 1e12))
    refusal(client.get(data["urls"]["get"]), 401)


def test_an_unknown_model_is_404_and_names_those_there_are(http: httpx.Client) -> None:
    """The list is what one wants to see next."""
    assert MODEL in refusal(http.post("/api/v3/wavespeed-ai/flux-dev", json={"prompt": "x"}), 404)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing/here", 404),
        ("GET", "/docs", 404),
        ("GET", "/api/v3/no/such-thing", 404),
        ("POST", f"/api/v4/{MODEL}", 404),
        ("GET", "/api/v9/predictions/0/result", 404),
        ("GET", f"/api/v3/{MODEL}", 405),
        ("DELETE", "/health", 405),
    ],
)
def test_wrong_paths_and_methods_have_the_error_body(http: httpx.Client, method: str, path: str, status: int) -> None:
    """Also the framework's own refusals come in the one form."""
    refusal(http.request(method, path), status)


def test_no_cross_origin_access(http: httpx.Client) -> None:
    """Pages of other sites get no permission, neither asked before nor granted after."""
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert http.options(f"/api/v3/{MODEL}", headers=headers).status_code == 405
    assert not [name for name in http.get("/health", headers=headers).headers if name.startswith("access-control")]


def test_health_needs_no_key(stack: Stack) -> None:
    """A liveness probe has none."""
    assert httpx.get(f"{stack.url}/health", trust_env=False).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (our.InvalidInput("loras.0.scale", "is bad"), 400, 'invalid request body, Error at "/loras/0/scale": is bad'),
        (our.LoraError("loras.1", "is bad"), 400, 'invalid request body, Error at "/loras/1": is bad'),
        (our.InvalidInput("", "not JSON"), 400, "invalid request body: not JSON"),
        (our.TooManyRequests("slow down", 7), 429, "slow down"),
        (our.Unavailable("not now", 3), 503, "not now"),
        (our.ModelError("no model"), 500, "no model"),
        (RuntimeError("/secret/path"), 500, "internal error; the log of the service has the details"),
    ],
)
def test_each_error_has_its_status_and_message(error: Exception, status: int, message: str) -> None:
    """Ours are shown as they are; unexpected ones keep their text to themselves."""
    app = FastAPI()
    errors.install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/")
    assert refusal(answer, status) == message
    assert answer.headers.get("retry-after") == (str(error.retry_after) if isinstance(error, our.RetryLater) else None)


def test_success_bodies_have_no_error_key(http: httpx.Client) -> None:
    """One client takes the mere presence of a top-level "error" for a failure."""
    data = submit(http)
    assert "error" not in http.get(data["urls"]["get"]).json()
    assert read(http, data)["error"] == ""
