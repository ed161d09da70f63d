"""A real receiver of webhooks on the loopback interface, and signatures checked by code that shares nothing with ours.

Knows HTTP and HMAC. Knows nothing of jobs.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Call:
    """One request that arrived."""

    path: str
    headers: Mapping[str, str]  # by lower-case name
    body: bytes


@dataclass
class Receiver:
    """What arrived, and what is answered: statuses in turn, the last one from then on."""

    url: str = ""
    port: int = 0
    statuses: list[int] = field(default_factory=lambda: [200])
    silence: float = 0.0  # seconds before an answer
    calls: list[Call] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, count: int, seconds: float = 15.0) -> list[Call]:
        """The calls, once there are ``count``."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.calls) >= count, seconds), f"{len(self.calls)} of {count}"
            return list(self.calls)

    def take(self, call: Call) -> int:
        """Note a call and say what to answer."""
        with self.arrived:
            status = self.statuses[min(len(self.calls), len(self.statuses) - 1)]
            self.calls.append(call)
            self.arrived.notify_all()
        time.sleep(self.silence)
        return status


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Listen on a free port of the loopback interface."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = receiver.take(Call(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            try:
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
            except BrokenPipeError:
                pass  # it has given up waiting

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.port = server.server_port
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def verify_v3(secret: str, call: Call, tolerance: float = 300.0) -> bool:
    """The check that the hosted service's documents describe, as a receiver would write it."""
    sent = dict(part.split(",", 1) for part in call.headers["webhook-signature"].split(" "))
    moment = call.headers["webhook-timestamp"]
    if abs(time.time() - int(moment)) > tolerance:
        return False
    signed = b".".join([call.headers["webhook-id"].encode(), moment.encode(), call.body])
    expected = hmac.new(secret[len("whsec_") :].encode("ascii"), signed, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, sent.get("v3", ""))
