"""What clients were told and what was done to the processes, while it happens. Knows nothing of how."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REFUSED_SHARE = 0.25  # of webhooks, that must come again


@dataclass
class Accepted:
    """A prediction that a client was given the id of."""

    id: str
    webhook: bool  # whether it wants one
    cancelled: bool = False  # a cancel was answered, and it had not ended then
    told: list[str] | None = None  # hashes of the pictures that a client was given, where it was


@dataclass
class Seen:
    """Everything that a promise was made about. Every change is made under ``lock``."""

    accepted: dict[str, Accepted] = field(default_factory=dict)
    uploads: dict[str, str] = field(default_factory=dict)  # path of the address -> hash of what was sent
    webhooks: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # prediction -> webhook ids
    odd: list[str] = field(default_factory=list)  # answers that no server may give
    refused: Counter[str] = field(default_factory=Counter)
    done_to: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, id: str, webhook: bool) -> Accepted:
        """Note an id that a client was given, maybe again."""
        with self.lock:
            return self.accepted.setdefault(id, Accepted(id, webhook))

    def refuse(self, why: str) -> None:
        """Count a request that was not answered well."""
        with self.lock:
            self.refused[why] += 1

    def happened(self, what: str) -> None:
        """Count something bad that was done."""
        with self.lock:
            self.done_to[what] += 1


def digest(data: bytes) -> str:
    """Hash of some bytes."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def receiver(seen: Seen, seed: int) -> Iterator[str]:
    """Take webhooks on a loopback port; some are refused, so that they must come again."""
    moods = random.Random(seed)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with seen.lock:
                refuse = moods.random() < REFUSED_SHARE
                if not refuse:
                    seen.webhooks[json.loads(body)["id"]].add(self.headers["webhook-id"])
            self.send_response(500 if refuse else 204)
            self.send_header("content-length", "0")
            self.end_headers()

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the sender was killed
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join(5)
