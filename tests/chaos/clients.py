"""Clients that submit, wait, cancel and upload, and send again whatever was not answered.

Knows HTTP and what a well-made client does. Knows nothing of what happens to the servers.
"""

from __future__ import annotations

import base64
import io
import random
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

from tests.chaos.seen import Accepted, Seen, digest

MODEL = "/api/v3/wavespeed-ai/sdxl-lora"
PAUSE = 0.1  # seconds before something is sent again
TIMEOUT = 20.0

Body = dict[str, object]


class Client:
    """One of several; runs until it is stopped.

    Args:
        bases: Addresses of the API processes.
        key: API key.
        hook: Where webhooks are taken.
        seen: Where to note what was promised.
        seed: Of its choices.
    """

    def __init__(self, bases: list[str], key: str, hook: str, seen: Seen, seed: int) -> None:
        self._bases = bases
        self._hook = hook
        self._seen = seen
        self._choices = random.Random(seed)
        self._stop = threading.Event()
        self._http = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT, trust_env=False)
        self._thread = threading.Thread(target=self._run, name=f"client-{seed}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more."""
        self._stop.set()

    def join(self) -> None:
        """Wait until the last request is over."""
        self._thread.join()
        self._http.close()

    def _run(self) -> None:
        acts = {self._asynchronous: 6, self._synchronous: 2, self._cancelled: 1, self._upload: 1}
        while not self._stop.is_set():
            (act,) = self._choices.choices(list(acts), list(acts.values()))
            act()
            self._stop.wait(self._choices.uniform(0, 0.2))

    def _asynchronous(self) -> Accepted | None:
        """Submit; sometimes send it once more, which must give the same id."""
        wants, headers = self._choices.random() < 0.5, self._idempotent()
        body = self._body() | {"enable_base64_output": not wants and self._choices.random() < 0.4}
        answer = self._until_accepted(body, headers, wants)
        if answer is None:
            return None
        accepted = self._seen.accept(answer["id"], wants)
        if self._choices.random() < 0.2:
            again = self._until_accepted(body, headers, wants)
            if again is not None and again["id"] != accepted.id:
                with self._seen.lock:
                    self._seen.odd.append(f"{accepted.id} and {again['id']} have one idempotency key")
        return accepted

    def _synchronous(self) -> None:
        """Submit and wait for the pictures in the answer; sent again until they are there."""
        body = self._body() | {"enable_sync_mode": True, "enable_base64_output": True}
        answer = self._until_accepted(body, self._idempotent(), False)
        if answer is None:
            return
        accepted = self._seen.accept(answer["id"], False)
        if answer["status"] == "completed":
            pictures = [digest(base64.b64decode(output)) for output in answer["outputs"]]
            with self._seen.lock:
                if accepted.told not in (None, pictures):
                    self._seen.odd.append(f"{accepted.id} was answered with other pictures the second time")
                accepted.told = pictures

    def _cancelled(self) -> None:
        """Submit, and cancel a moment later."""
        accepted = self._asynchronous()
        self._stop.wait(self._choices.uniform(0, 0.5))
        while accepted is not None and not self._stop.is_set():
            answer = self._send("DELETE", f"/api/v3/predictions/{accepted.id}")
            if answer is not None and answer.status_code == 200:
                with self._seen.lock:
                    accepted.cancelled = answer.json()["data"]["status"] != "completed"
                return
            self._stop.wait(PAUSE)

    def _upload(self) -> None:
        """Send a file; it must be there from the answer on."""
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), (self._choices.randrange(256),) * 3).save(picture, "PNG")
        data = picture.getvalue()
        while not self._stop.is_set():
            files = {"file": ("dot.png", data, "image/png")}
            answer = self._send("POST", "/api/v3/media/upload/binary", files=files)
            if answer is not None and answer.status_code == 200:
                with self._seen.lock:
                    self._seen.uploads[urlsplit(answer.json()["data"]["download_url"]).path] = digest(data)
                return
            self._stop.wait(PAUSE)

    def _body(self) -> Body:
        return {
            "prompt": f"job {self._choices.randrange(10**9)}",
            "size": "512*512",
            "num_inference_steps": self._choices.randint(1, 20),
            "num_images": self._choices.randint(1, 2),
        }

    def _idempotent(self) -> dict[str, str]:
        return {"Idempotency-Key": f"{self._choices.getrandbits(128):032x}"}

    def _until_accepted(self, body: Body, headers: dict[str, str], wants: bool) -> dict[str, Any] | None:
        """Send a submit, to any API and under one idempotency key, until it is accepted or it is time to stop."""
        while not self._stop.is_set():
            params = {"webhook": self._hook} if wants else None
            answer = self._send("POST", MODEL, params=params, json=body, headers=headers)
            if answer is not None and answer.status_code == 200:
                data: dict[str, Any] = answer.json()["data"]
                return data
            self._stop.wait(PAUSE)
        return None

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        try:
            answer = self._http.request(method, self._choices.choice(self._bases) + path, **options)
        except httpx.TransportError as error:
            self._seen.refuse(type(error).__name__)
            return None
        if answer.status_code != 200:
            self._seen.refuse(str(answer.status_code))
        if 400 <= answer.status_code < 500 or answer.status_code == 500:  # nothing was wrong with the request
            with self._seen.lock:
                self._seen.odd.append(f"{method} {path} was answered {answer.status_code}: {answer.text[:200]}")
        return answer
