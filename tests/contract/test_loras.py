"""The prediction says what became of each LoRA, in a field that clients written for the original do not know."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import wavespeed

from impasto.jobs.records import Lease
from impasto.lora.report import LoraReport
from impasto.types import Event, Finished, GenerationRequest
from impasto.worker.backend import FakeBackend

from .conftest import MODEL, Stack, read, submit


class ReportingBackend(FakeBackend):
    """Draws patterns, and reports on LoRAs as the engine does: under the path of the file it was given."""

    def __init__(self) -> None:
        super().__init__(step_seconds=0.001)
        self.requests: dict[str, GenerationRequest] = {}

    def submit(self, request: GenerationRequest, request_id: str) -> Any:
        self.requests[request_id] = request
        return super().submit(request, request_id)

    def step(self) -> list[Event]:
        return [
            replace(event, reports=self.reports(event.request_id)) if isinstance(event, Finished) else event
            for event in super().step()
        ]

    def reports(self, request_id: str) -> tuple[LoraReport, ...]:
        return tuple(
            LoraReport(lora.path, lora.scale, i, kinds={"LoRA": 722}, ranks=(8, 16), applied={"unet": 722}, sha256="ab")
            for i, lora in enumerate(self.requests[request_id].loras)
            if lora.scale
        )


@contextmanager
def worker(stack: Stack) -> Iterator[None]:
    """The real loop, with LoRA files in its folder."""
    for name in ("fox.safetensors", "owner/line.safetensors"):
        file = stack.settings.lora_dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"never read by this backend")
    with stack.worker(ReportingBackend()):
        yield


LORAS = [{"path": "fox", "scale": 0.8}, {"path": "owner/line", "scale": 1.5}]


def test_a_completed_prediction_reports_on_each_lora(stack: Stack, http: httpx.Client, caplog: Any) -> None:
    """Under the names that the user gave, with nothing of the server's folders; the log has a line for each."""
    with caplog.at_level(logging.INFO, "impasto.worker.loop"), worker(stack):
        done = submit(http, loras=LORAS, enable_sync_mode=True)
    assert done["status"] == "completed"
    assert [(lora["path"], lora["scale"], lora["resolved"]) for lora in done["loras"]] == [
        ("fox", 0.8, "folder:fox.safetensors"),
        ("owner/line", 1.5, "folder:owner/line.safetensors"),
    ]
    assert done["loras"][0] == {
        "path": "fox",
        "scale": 0.8,
        "resolved": "folder:fox.safetensors",
        "applied": {"unet": 722},
        "kinds": {"LoRA": 722},
        "ranks": [8, 16],
        "mismatched": {"count": 0, "first": []},
        "unmatched": {"count": 0, "first": []},
        "ignored": {"count": 0, "first": []},
        "base_model": "unknown",
        "embeddings": [],
        "trigger_words": [],
        "sha256": "ab",
        "warnings": [],
    }
    assert read(http, done) == done
    assert str(stack.settings.data_dir) not in str(done)
    assert "LoRA 'fox' at 0.8: LoRA of rank 8 to 16 on 722 modules (unet 722), sha256 ab" in caplog.text
    assert "LoRA 'owner/line' at 1.5" in caplog.text


def test_without_loras_the_field_is_absent(stack: Stack, http: httpx.Client) -> None:
    """Before completion too; a client that lists unknown fields sees none."""
    assert "loras" not in submit(http, loras=LORAS)
    with worker(stack):
        assert "loras" not in submit(http, enable_sync_mode=True)


def test_the_official_client_ignores_the_field(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """It delivers the outputs as ever; the field is in the raw result for those who look."""
    monkeypatch.setenv("NO_PROXY", "*")
    client = wavespeed.Client(api_key=stack.key, base_url=stack.url)
    request = {"prompt": "a fox", "size": "512*512", "loras": LORAS}
    with worker(stack):
        done = client.run_no_throw(MODEL, request, poll_interval=0.05)
    assert (done["status"], done["error"], len(done["outputs"])) == ("completed", None, 1)
    assert [lora["path"] for lora in client.get_result(done["task_id"])["data"]["loras"]] == ["fox", "owner/line"]


def test_a_report_of_another_version_is_shown_as_far_as_it_is_known(stack: Stack, http: httpx.Client) -> None:
    """What an older or newer worker stored never makes a prediction unreadable."""
    prediction = submit(http)
    [job] = [job for job in stack.claim() if job.id == prediction["id"]]
    stored = [{"path": "a", "scale": 1, "colour": "red"}]
    assert stack.store.complete(Lease(job.id, job.attempt), [], {}, stored)
    [shown] = read(http, prediction)["loras"]
    assert (shown["path"], shown["base_model"], shown["applied"], "colour" in shown) == ("a", "unknown", {}, False)
