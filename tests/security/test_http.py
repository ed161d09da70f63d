"""The edge: whom the service answers to, whom it believes, who may read its answers, and what every answer carries."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.contract.conftest import MODEL, refusal, submit

HOSTS = ["pictures.example", "*.b.example"]
APP = "https://app.example"
ASKING = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def permissions(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("pictures.example", True), ("PICTURES.example:8443", True), ("pictures.example.", True), ("x.b.example", True),
        ("evil.example", False), ("b.example", False), ("pictures.example.evil.example", False), ("127.0.0.1", False),
        ("[::1]:80", False), ("", False),
    ],
)  # fmt: skip
def test_other_names_than_ours_are_refused(serve, host, taken):
    """A page that bends its own name to our address (DNS rebinding) gets nothing; without the setting any name will do,
    and probes, which ask by address, always get their answer."""
    with serve(allowed_hosts=HOSTS) as stack:
        answer = stack.client().get("/api/v3/models", headers={"Host": host})
        if taken:
            assert answer.status_code == 200
        else:
            assert "host name" in refusal(answer, 400)
        assert httpx.get(f"{stack.url}/healthz", headers={"Host": host}).status_code == 200


def test_any_name_will_do_by_default(stack):
    """The control: nothing else refuses names."""
    assert stack.client().get("/api/v3/models", headers={"Host": "evil.example"}).status_code == 200


FORWARDED = {
    "X-Forwarded-Proto": "https", "X-Forwarded-Host": "front.example", "X-Forwarded-For": "203.0.113.9",
    "Forwarded": "host=evil.example", "X-Real-IP": "203.0.113.9",
}  # fmt: skip


def test_a_strangers_forwarding_headers_change_nothing(stack):
    """Neither scheme nor host of our URLs."""
    data = stack.client(**FORWARDED).post(f"/api/v3/{MODEL}", json={"prompt": "x"}).json()["data"]
    assert data["urls"]["get"].startswith(f"{stack.url}/api/")


@pytest.mark.parametrize("proxies", [["127.0.0.1"], ["127.0.0.0/8", "::1"]])
def test_a_trusted_proxys_are_believed(serve, proxies):
    """The control: the same headers from a trusted address make the URLs that its clients can use."""
    with serve(trusted_proxies=proxies) as stack:
        data = stack.client(**FORWARDED).post(f"/api/v3/{MODEL}", json={"prompt": "x"}).json()["data"]
        assert data["urls"]["get"].startswith("https://front.example/api/")


def test_a_forwarded_host_that_is_none_makes_no_url(serve):
    """A proxy passes on what it got; what is no host name gives way to the socket's address."""
    with serve(trusted_proxies=["127.0.0.1"]) as stack:
        client = stack.client(**{"X-Forwarded-Host": "evil.example/path?<script>"})
        data = client.post(f"/api/v3/{MODEL}", json={"prompt": "x"}).json()["data"]
        assert data["urls"]["get"].startswith(f"{stack.url}/api/")


def test_the_host_list_counts_what_a_trusted_proxy_says(serve):
    """The name that the client called is the one that is checked."""
    with serve(trusted_proxies=["127.0.0.1"], allowed_hosts=["front.example"]) as stack:
        client = stack.client()
        assert client.get("/api/v3/models", headers=FORWARDED).status_code == 200
        assert client.get("/api/v3/models", headers=FORWARDED | {"X-Forwarded-Host": "x.example"}).status_code == 400


@pytest.mark.parametrize("origin", [APP, "https://evil.example", "null"])
def test_no_origin_is_let_in_by_default(stack, origin):
    """Neither asked before nor granted after."""
    client = stack.client(Origin=origin)
    assert client.options(f"/api/v3/{MODEL}", headers=ASKING).status_code == 405
    assert permissions(client.get("/api/v3/models")) == {}


@pytest.mark.parametrize(
    ("setting", "origin", "granted"),
    [
        ([APP], APP, APP), ([APP], "https://evil.example", None), ([APP], "http://app.example", None),
        ([APP], "https://app.example.evil.example", None), ([APP], "null", None),
        (["*"], "https://any.example", "*"), (["*"], "null", None),
    ],
)  # fmt: skip
def test_named_origins_are_let_in_and_no_others(serve, setting, origin, granted):
    """By preflight and by answer; never with cookies, and never a page without an origin."""
    with serve(cors_origins=setting) as stack:
        client = stack.client(Origin=origin)
        before, after = client.options(f"/api/v3/{MODEL}", headers=ASKING), client.get("/api/v3/models")
        for answer in (before, after):
            assert answer.headers.get("access-control-allow-origin") == granted
            assert "access-control-allow-credentials" not in answer.headers
        assert after.status_code == 200, "a request is answered all the same: it is its key that counts"
        if granted:
            assert before.status_code == 200
            assert "authorization" in before.headers["access-control-allow-headers"].lower()


ROUTES = [
    ("GET", "/", 200), ("GET", "/health", 200), ("GET", "/nothing", 404), ("DELETE", "/health", 405),
    ("GET", "/api/v3/models", 200), ("POST", f"/api/v3/{MODEL}", 400), ("GET", "/v1/models", 200),
    ("GET", "/outputs/x", 404), ("GET", "/openapi.json", 200), ("GET", "/metrics", 200),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_every_answer_has_the_headers_that_keep_it_harmless(stack, method, path, status):
    """Also refusals and the page; no answer says what software made it, or sets a cookie."""
    answer = stack.client().request(method, path)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy or "default-src 'self'" in policy
    assert answer.headers["x-frame-options"] == "DENY" or "frame-ancestors 'none'" in policy
    assert "server" not in answer.headers
    assert "set-cookie" not in answer.headers


def test_our_own_faults_have_them_too(serve, monkeypatch):
    """The answer to an unexpected error is made outside of everything else."""
    with serve() as stack:
        monkeypatch.setattr(stack.store, "create", None)
        answer = stack.client().post(f"/api/v3/{MODEL}", json={"prompt": "x"})
        assert "log of the service" in refusal(answer, 500)
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_served_pictures_can_be_shown_and_not_run(stack):
    """A fixed type, no sniffing, no scripts: the policies of files are their own."""
    data = submit(stack.client())
    stack.work_off()
    [url] = stack.client().get(data["urls"]["get"]).json()["data"]["outputs"]
    headers = httpx.get(url).headers
    assert headers["content-type"] == "image/png"
    assert headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert headers["cache-control"].startswith("private")


def test_a_header_with_ten_thousand_ranges_costs_nothing(stack):
    """CVE-2025-62727: several ranges are answered by the whole file, and too long a header is refused unread."""
    data = submit(stack.client())
    stack.work_off()
    [url] = stack.client().get(data["urls"]["get"]).json()["data"]["outputs"]
    whole = httpx.get(url).content
    some = httpx.get(url, headers={"Range": "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(5000))})
    assert (some.status_code, some.content) == (200, whole)
    many = httpx.get(url, headers={"Range": "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(10_000))})
    assert many.status_code == 431


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_no_route_reads_more_than_it_has_use_for(serve, method):
    """Every route that takes a body refuses one over the limit, also where it comes in pieces of unknown number."""
    with serve(max_body_bytes=10_000, max_upload_bytes=10_000) as stack:
        client, tried = stack.client(), 0
        paths = [path for path, item in stack.app.openapi()["paths"].items() if method.lower() in item]
        for path in [*paths, "/v1/elsewhere", "/api/v3/no/model", "/"]:
            path = re.sub(r"\{[^}]*\}", "0" * 32, path)
            for body in (b"x" * 200_000, iter([b"x" * 20_000] * 10)):
                answer = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
                assert answer.status_code in (400, 401, 403, 404, 405, 413), (path, answer.status_code)
                tried += 1
        assert tried >= (30 if method == "POST" else 8)


def test_cookies_and_forms_of_other_sites_open_nothing(stack):
    """CVE-2026-56674: there is no session to ride; without the header with the key nothing is done."""
    for headers in ({"Cookie": f"key={stack.key}"}, {"Origin": "null"}, {"Authorization": f"Basic {stack.key}"}):
        answer = httpx.post(f"{stack.url}/api/v3/{MODEL}", data={"prompt": "x"}, headers=headers)
        refusal(answer, 401)
