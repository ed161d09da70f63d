"""A ComfyUI's HTTP API and websocket: prompts in, and everything that is told of them.

Knows ComfyUI's routes and messages. Knows nothing of our nodes.
"""

from __future__ import annotations

import io
import json
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image
from websockets.sync.client import connect

from tests.comfyui.programs import Trouble

RUN_SECONDS = 900.0
PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4  # ComfyUI's kinds of binary messages
ENDS = ("execution_success", "execution_error", "execution_interrupted")

Prompt = Mapping[str, Any]  # a workflow in API format


@dataclass
class Run:
    """What was told of one prompt."""

    id: str
    end: str = ""  # one of ENDS
    error: str = ""
    steps: dict[str, list[int]] = field(default_factory=dict)  # node -> the steps that its bar showed
    previews: list[Image.Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    executed: dict[str, dict[str, Any]] = field(default_factory=dict)  # node -> what its UI shows
    history: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """ComfyUI's validation refused a prompt; ``errors`` is by node."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(json.dumps(body)[:2000])
        self.errors: dict[str, Any] = body.get("node_errors", {})


class ComfyUi:
    """A running ComfyUI."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=60)

    def get(self, path: str, **params: str) -> httpx.Response:
        """Read something that must be there."""
        answer = self._http.get(path, params=params)
        if not answer.is_success:
            raise Trouble(f"ComfyUI answers {path} with {answer.status_code}: {answer.text[:300]}")
        return answer

    def interrupt(self) -> None:
        """Press the stop button."""
        self._http.post("/interrupt").raise_for_status()

    def run(self, prompt: Prompt, watch: Callable[[Run], None] = lambda _: None) -> Run:
        """Run a prompt to its end; ``watch`` is called after each message of it.

        Raises:
            Refused: By validation, before it ran.
        """
        client = uuid.uuid4().hex
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client}"
        with connect(address, max_size=None, proxy=None, ping_interval=None) as line:
            answer = self._http.post("/prompt", json={"prompt": prompt, "client_id": client})
            if answer.status_code == 400:
                raise Refused(answer.json())
            answer.raise_for_status()
            run = Run(answer.json()["prompt_id"])
            deadline = time.monotonic() + RUN_SECONDS
            while not run.end:
                _hear(run, line.recv(timeout=max(0.1, deadline - time.monotonic())))
                watch(run)
        run.history = self.get(f"/history/{run.id}").json().get(run.id, {})
        return run

    def pictures(self, run: Run, node: str) -> list[Image.Image]:
        """Fetch the pictures that a node saved or previewed; videos are none."""
        return [Image.open(io.BytesIO(data)) for data in self.files(run, node) if not _is_video(data)]

    def files(self, run: Run, node: str) -> list[bytes]:
        """Fetch the files that a node's UI names."""
        return [
            self.get("/view", filename=item["filename"], subfolder=item["subfolder"], type=item["type"]).content
            for item in run.executed.get(node, {}).get("images", [])
        ]


def _is_video(data: bytes) -> bool:
    """MP4 and its kin, and WebM."""
    return data[4:8] == b"ftyp" or data.startswith(b"\x1aE\xdf\xa3")


def _hear(run: Run, message: str | bytes) -> None:
    if isinstance(message, bytes):
        _hear_bytes(run, message)
        return
    told = json.loads(message)
    kind, data = told["type"], told["data"]
    if data.get("prompt_id", run.id) != run.id:
        return
    if kind == "progress":
        run.steps.setdefault(str(data["node"]), []).append(int(data["value"]))
    elif kind == "progress_state":
        for node, state in data["nodes"].items():
            run.steps.setdefault(node, []).append(int(state["value"]))
    elif kind == "executed":
        run.executed[str(data["node"])] = data["output"] or {}
    elif kind in ENDS:
        run.end = kind
        run.error = f"{data.get('exception_type', '')}: {data.get('exception_message', '')}".strip()


def _hear_bytes(run: Run, message: bytes) -> None:
    kind = struct.unpack(">I", message[:4])[0]
    if kind == TEXT:
        length = struct.unpack(">I", message[4:8])[0]
        run.texts.append(message[8 + length :].decode())
    elif kind == PREVIEW:
        run.previews.append(Image.open(io.BytesIO(message[8:])))
    elif kind == PREVIEW_WITH_METADATA:
        length = struct.unpack(">I", message[4:8])[0]
        run.previews.append(Image.open(io.BytesIO(message[8 + length :])))
