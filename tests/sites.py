"""Web servers on loopback: files with all that HTTP lets a server do, and Civitai's protocol.

Written from what the sites answer. Knows nothing of our client. The hub's protocol is in ``hub_server``.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Page:
    """What one path answers."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    etag: str | None = None
    ranges: bool = True
    cut_once: int | None = None  # bytes after which the first transfer breaks off
    gate: threading.Event | None = None  # set: the body goes on behind its first byte
    drip: float = 0.0  # seconds between single bytes
    length: int | None = None  # what Content-Length says instead of the truth; -1: nothing
    token: str | None = None  # who does not show it gets 401


def redirect(to: str, status: int = 302) -> Page:
    """Elsewhere."""
    return Page(status=status, headers={"Location": to})


class Web(ThreadingHTTPServer):
    """The server. ``asked`` has each request's path and headers, ``reached`` counts the connections."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.reached = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> Any:
        self.reached += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is what some tests are about

    def page(self, path: str) -> Page | None:
        """What a path answers; sites of their own override it."""
        return self.pages.get(urlsplit(path).path)


@contextmanager
def running(server: Web) -> Iterator[Any]:
    """A server for the length of a block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        for page in server.pages.values():
            if page.gate:
                page.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        page = self.server.page(self.path) or Page(b"no such page", 404)
        if page.token and self.headers.get("Authorization") != f"Bearer {page.token}":
            page = Page(b"{}", 401)
        if page.etag and self.headers.get("If-None-Match") == page.etag:
            self._head(304, {"ETag": page.etag}, 0)
            return
        status, headers, body = page.status, dict(page.headers), page.body
        if page.etag:
            headers["ETag"] = page.etag
        condition = self.headers.get("If-Range")
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and page.ranges and status == 200 and condition in (None, page.etag):
            if int(match[1]) >= len(body):
                self._head(416, {"Content-Range": f"bytes */{len(body)}"}, 0)
                return
            headers["Content-Range"] = f"bytes {match[1]}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[int(match[1]) :]
        self._head(status, headers, len(body) if page.length is None else page.length)
        self._body(page, body)

    def _head(self, status: int, headers: dict[str, str], length: int):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        if length >= 0:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _body(self, page: Page, body: bytes):
        if page.cut_once is not None:
            cut, page.cut_once = page.cut_once, None
            self.wfile.write(body[:cut])
        elif page.drip:
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(page.drip)
        else:
            if page.gate:
                self.wfile.write(body[:1])
                self.wfile.flush()
                page.gate.wait(30)
                body = body[1:]
            self.wfile.write(body)

    def log_message(self, *args: Any):
        pass


class CivitaiSite(Web):
    """Civitai: its API from a table of versions, and its downloads, which go on to a store of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[int, dict[str, Any]] = {}
        self.files: dict[int, bytes] = {}
        self.download_token: str | None = None
        self.store: Web | None = None

    def add(self, model: int, version: int, data: bytes, base: str = "SDXL 1.0", kind: str = "LORA", **other: Any):
        """One version with one file."""
        named = {"name": f"v{version}.safetensors", "type": "Model", "primary": True, "id": version}
        named |= {"metadata": {"format": "SafeTensor", "size": "full", "fp": "fp16"}, "sizeKB": len(data) / 1024}
        named |= {"hashes": {"SHA256": hashlib.sha256(data).hexdigest().upper()}} | other
        described = {"id": version, "modelId": model, "baseModel": base, "files": [named], "trainedWords": ["pixel"]}
        self.versions[version] = described | {"model": {"name": "m", "type": kind}}
        self.files[version] = data

    def page(self, path: str) -> Page | None:
        parts = urlsplit(path)
        if m := re.fullmatch(r"/api/v1/model-versions/(\d+)", parts.path):
            return self._json(self.versions.get(int(m[1])))
        if m := re.fullmatch(r"/api/v1/models/(\d+)", parts.path):
            found = [v for v in self.versions.values() if v["modelId"] == int(m[1])]
            kind = found[0]["model"]["type"] if found else ""
            bare = [{k: v for k, v in version.items() if k not in ("modelId", "model")} for version in found]
            return self._json({"id": int(m[1]), "type": kind, "modelVersions": bare} if found else None)
        if m := re.fullmatch(r"/api/download/models/(\d+)", parts.path):
            return self._download(int(m[1]), parse_qs(parts.query))
        return None

    def _download(self, version: int, query: dict[str, list[str]]) -> Page | None:
        if version not in self.files:
            return None
        if self.store is None:
            return Page(self.files[version], token=self.download_token)
        self.store.pages[f"/{version}"] = Page(self.files[version])
        page = redirect(f"http://localhost:{self.store.server_port}/{version}?X-Amz-Signature=abc", 307)
        page.token = self.download_token
        return page

    @staticmethod
    def _json(document: Any) -> Page:
        return Page(json.dumps(document or {"error": "none"}).encode(), 200 if document else 404)
