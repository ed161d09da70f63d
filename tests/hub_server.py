"""A model hub on loopback: the parts of the hub's protocol that fetching a model uses, and a count of what was asked.

Large files are answered as the hub does: the metadata by a redirect, the bytes from another address, with ranges.
Written from what the hub answers. Knows nothing of our client.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".ckpt", ".onnx", ".msgpack")


@dataclass
class Repository:
    """One repository: its files at one commit, and how it misbehaves."""

    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None  # status and error code for everybody without the token
    token: str | None = None
    claimed_sizes: dict[str, int] = field(default_factory=dict)  # what the listing says instead of the truth
    cut_once: dict[str, int] = field(default_factory=dict)  # bytes after which a file's first transfer breaks off
    failing: set[str] = field(default_factory=set)  # files whose transfer is answered by 500

    @property
    def commit(self) -> str:
        names = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.files.items())
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of a model folder, as a repository has them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hub(ThreadingHTTPServer):
    """The server; ``asked`` holds each request as ``METHOD path``, with the range where one was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage_url(self) -> str:
        """Where large files come from: another host, to a client that keeps its token for the hub."""
        return f"http://localhost:{self.server_port}"

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {m[1] for line in self.asked if (m := re.match(r"GET /(?:.+/resolve/\w+|cdn/[^/]+/[^/]+)/(\S+)", line))}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub for the length of a block; afterwards nobody listens."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range")
        self.server.asked.append(f"{self.command} {path}" + (f" {wanted}" if wanted else ""))
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._api(m[1], m[2], m[3])
        elif m := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._bytes(self.server.repositories[m[1]], m[2], {})
        elif m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(m[1], m[2], m[3])
        else:
            self._answer(404, {}, b"")

    def _api(self, repo_id: str, what: str, revision: str):
        if (repository := self._allowed(repo_id, revision)) is None:
            return
        if what == "revision":
            siblings = [{"rfilename": name} for name in repository.files]
            body: Any = {"id": repo_id, "sha": repository.commit, "siblings": siblings}
        else:
            body = [self._entry(repository, name, data) for name, data in repository.files.items()]
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _entry(self, repository: Repository, name: str, data: bytes) -> dict[str, Any]:
        size = repository.claimed_sizes.get(name, len(data))
        entry = {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        return entry

    def _resolve(self, repo_id: str, revision: str, name: str):
        if (repository := self._allowed(repo_id, revision)) is None:
            return
        if name not in repository.files:
            self._refuse(404, "EntryNotFound")
            return
        data = repository.files[name]
        commit = {"X-Repo-Commit": repository.commit}
        if not name.endswith(LARGE):
            self._bytes(repository, name, {**commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
            return
        size = str(repository.claimed_sizes.get(name, len(data)))
        linked = {"X-Linked-Size": size, "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self._answer(302, {**commit, **linked, "Location": f"{self.server.storage_url}/cdn/{repo_id}/{name}"}, b"")

    def _bytes(self, repository: Repository, name: str, headers: dict[str, str]):
        if name in repository.failing:
            self._answer(500, {}, b"")
            return
        data, status = repository.files[name], 200
        if m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            headers |= {"Content-Range": f"bytes {m[1]}-{len(data) - 1}/{len(data)}"}
            data, status = data[int(m[1]) :], 206
        cut = repository.cut_once.pop(name, None) if self.command == "GET" else None
        self._answer(status, headers, data, cut)

    def _allowed(self, repo_id: str, revision: str) -> Repository | None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.refusal and self.headers.get("Authorization") != f"Bearer {repository.token}":
            self._refuse(*repository.refusal)
        elif revision not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _refuse(self, status: int, code: str):
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": code} if code else {}, b"")

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])

    def log_message(self, *args: Any):
        pass
