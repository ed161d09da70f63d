"""Paths with slashes too many: a base URL that ends in one, a path that does."""

from __future__ import annotations

import socket

import httpx
import pytest

from .conftest import MODEL, Stack, refusal, submit


def raw(stack: Stack, method: str, path: str, body: bytes = b"") -> httpx.Response:
    """Send a path exactly as it is written: clients' libraries tidy some of them."""
    host, port = stack.url.removeprefix("http://").split(":")
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {stack.key}\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head_bytes, _, content = answer.partition(b"\r\n\r\n")
    return httpx.Response(int(head_bytes.split()[1]), content=content)


@pytest.mark.parametrize("path", ["//api/v3/models", "/api/v3/models/", "/api/v3//balance", "//api/v2/balance//"])
def test_slashes_too_many_do_not_matter(stack: Stack, path: str) -> None:
    """A setting ``http://host:8000/`` works in clients that put base and path together as they are."""
    assert raw(stack, "GET", path).json()["code"] == 200


def test_submit_and_poll_with_a_base_url_that_ends_in_a_slash(stack: Stack) -> None:
    """The address to poll is the plain one, in the version that was called."""
    made = raw(stack, "POST", f"//api/v2/{MODEL}", b'{"prompt": "a red fox"}').json()["data"]
    assert made["urls"]["get"] == f"{stack.url}/api/v2/predictions/{made['id']}/result"
    assert raw(stack, "GET", f"//api/v2/predictions/{made['id']}/result/").json()["data"]["id"] == made["id"]


def test_what_is_not_there_stays_so(stack: Stack, http: httpx.Client) -> None:
    """Slashes make no path out of another; and a path without too many is untouched."""
    prediction = submit(http)["id"]
    assert refusal(raw(stack, "GET", f"/api/v3/predictions/{prediction[:16]}//{prediction[16:]}"), 404)
    assert raw(stack, "GET", "/").status_code == 200
