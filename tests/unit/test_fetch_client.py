"""One GET: redirects, tokens, limits; the servers are real and on loopback, which the policy of these tests allows."""

import gzip
import threading
import time

import pytest

from impasto.fetch.addresses import Policy
from impasto.fetch.client import Client, Token
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from tests.sites import Page, Web, redirect, running


@pytest.fixture
def web():
    with running(Web()) as server:
        yield server


def client_of(*servers):
    ports = [server.server_port for server in servers]
    return Client(Policy.of(["127.0.0.0/8", "::1"], allow_http=True, ports=ports))


def get(client, url, seconds=5.0, max_bytes=1000, **options):
    with client.open(url, Clock(seconds), max_bytes=max_bytes, **options) as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(web, status):
    """Of every kind, relative and absolute."""
    web.pages |= {"/a": redirect("b?c=d", status), "/b": redirect(f"{web.url}/end", status), "/end": Page(b"here")}
    assert get(client_of(web), f"{web.url}/a") == (200, b"here")
    assert [path for path, _ in web.asked] == ["/a", "/b?c=d", "/end"]


def test_three_redirects_are_followed_and_not_a_fourth(web):
    """A loop ends as well."""
    web.pages |= {f"/{i}": redirect(f"/{i + 1}") for i in range(4)} | {"/4": Page(b"end"), "/loop": redirect("/loop")}
    assert get(client_of(web), f"{web.url}/1") == (200, b"end")
    for path in ("/0", "/loop"):
        with pytest.raises(FetchFailed, match="redirects more than 3 times"):
            get(client_of(web), f"{web.url}{path}")


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://u:p@127.0.0.1/", "gopher://x"])
def test_a_redirect_to_what_is_no_web_address_is_not_followed(web, where):
    """The same rules as for the first address."""
    web.pages["/a"] = redirect(where)
    with pytest.raises(FetchFailed, match="redirects to an address that"):
        get(client_of(web), f"{web.url}/a")


def test_a_token_goes_to_its_own_site_alone(web):
    """Not to the store that the site redirects to, and not back again afterwards; without one, to nobody."""
    with running(Web()) as store:
        back = f"{web.url}/end"
        web.pages |= {"/a": redirect(f"http://localhost:{store.server_port}/b"), "/end": Page(b"end", token="s3cret")}
        store.pages |= {"/b": redirect(back)}
        token = Token.of(web.url, "s3cret")
        client = client_of(web, store)
        assert get(client, back, token=token) == (200, b"end")
        assert get(client, f"{web.url}/a", token=token)[0] == 401
        assert [headers.get("authorization") for _, headers in web.asked] == ["Bearer s3cret", "Bearer s3cret", None]
        assert [headers.get("authorization") for _, headers in store.asked] == [None]
        get(client, f"http://localhost:{store.server_port}/b", token=token)
        assert store.asked[-1][1].get("authorization") is None
    assert "s3cret" not in repr(token)


def test_too_large_a_body_is_not_read(web):
    """Told by its length, or counted where the length is a lie or absent."""
    web.pages["/big"] = Page(bytes(2000))
    with pytest.raises(FetchFailed, match=r"is too large: at most 0\.001 MB"):
        get(client_of(web), f"{web.url}/big")
    assert get(client_of(web), f"{web.url}/big", max_bytes=2000) == (200, bytes(2000))


def test_a_body_without_a_length_is_counted(web):
    """Nothing said at the start: it ends at the limit all the same, and is whole below it."""
    chunks = b"".join(b"64\r\n" + bytes(100) + b"\r\n" for _ in range(20)) + b"0\r\n\r\n"
    web.pages["/big"] = Page(chunks, headers={"Transfer-Encoding": "chunked"}, length=-1)
    with pytest.raises(FetchFailed, match="is too large"):
        get(client_of(web), f"{web.url}/big")
    assert get(client_of(web), f"{web.url}/big", max_bytes=2000) == (200, bytes(2000))


def test_a_compressed_body_is_refused(web):
    """It was asked for as it is; a megabyte can stand for a gigabyte."""
    web.pages["/z"] = Page(gzip.compress(bytes(100_000)), headers={"Content-Encoding": "gzip"})
    with pytest.raises(FetchFailed, match="came compressed"):
        get(client_of(web), f"{web.url}/z")


def test_a_body_that_breaks_off_is_told(web):
    """Less than the length promised is never taken for the whole."""
    web.pages["/cut"] = Page(b"x" * 500, cut_once=100)
    with pytest.raises(FetchFailed, match="broke off") as failure:
        get(client_of(web), f"{web.url}/cut")
    assert failure.value.reason == "broken" and failure.value.away


def test_a_server_that_drips_is_given_up_at_the_deadline(web):
    """A byte now and then resets no clock."""
    web.pages["/drip"] = Page(b"x" * 500, drip=0.05)
    began = time.monotonic()
    with pytest.raises(FetchFailed, match="did not arrive in time") as failure:
        get(client_of(web), f"{web.url}/drip", seconds=0.7)
    assert time.monotonic() - began < 2
    assert failure.value.reason == "slow"


def test_what_nobody_waits_for_is_given_up_soon(web):
    """Within a second, in the middle of a silence."""
    web.pages["/stuck"] = Page(b"x" * 500, gate=threading.Event())
    gone = threading.Event()
    threading.Timer(0.3, gone.set).start()
    began = time.monotonic()
    with (
        pytest.raises(FetchFailed) as failure,
        client_of(web).open(f"{web.url}/stuck", Clock(30, gone.is_set), max_bytes=1000) as answer,
    ):
        answer.read()
    assert failure.value.reason == "stopped"
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [(401, {}, "needs a login"), (403, {}, "needs a login"), (404, {}, "was not found there"),
     (429, {"Retry-After": "17"}, "try again in 17 s"), (429, {"Retry-After": "Wed, 21 Oct"}, "try again later"),
     (500, {}, "status 500"), (418, {}, "status 418")],
)  # fmt: skip
def test_each_refusal_says_what_to_do(web, status, headers, words):
    """The site's own text is never repeated."""
    web.pages["/x"] = Page(b"<h1>INTERNAL</h1>", status, headers)
    with client_of(web).open(f"{web.url}/x", Clock(5), max_bytes=1000) as answer:
        failure = answer.failure()
    assert words in str(failure) and "INTERNAL" not in str(failure)
    assert failure.away == (status in (429, 500))
    assert failure.retry_after == (17 if "17" in headers.values() else None)


@pytest.mark.parametrize("body", [b"<html>", b"", b"[" * 100_000, b'{"a":', b"\xff\xfe"])
def test_an_answer_that_is_no_json_is_told(web, body):
    """A login page in place of the API, say."""
    web.pages["/api"] = Page(body)
    with pytest.raises(FetchFailed, match="no JSON"):
        client_of(web).json(f"{web.url}/api", Clock(5))
    web.pages["/api"] = Page(b'{"a": [1]}')
    assert client_of(web).json(f"{web.url}/api", Clock(5)) == {"a": [1]}
