"""Health, readiness and metrics, over the socket."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from impasto.jobs.workers import WorkerReport, WorkerReports

from .conftest import Stack, refusal, submit
from .test_events import working

Serve = Callable[..., AbstractContextManager[Stack]]
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def scrape(client: httpx.Client) -> dict[str, Metric]:
    """Read /metrics with Prometheus' own parser."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families), "each family stands once"
    return {family.name: family for family in families}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The value of the one sample with these labels."""
    [family] = [family for family in families.values() if name.startswith(family.name)]
    found = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    assert len(found) == 1, (name, labels, family.samples)
    return found[0]


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_health_needs_nothing(stack: Stack) -> None:
    """The process answers, so it is alive; both names."""
    for path in ("/healthz", "/health"):
        answer = stack.client(key="").get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_ready_means_that_a_worker_is_there(serve: Serve) -> None:
    """503 with the reason until a worker was heard, 200 then, 503 again when it has gone."""
    with serve() as stack:
        client = stack.client(key="")
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["checks"]["database"] == "ok"
        assert "none was heard" in answer.json()["checks"]["workers"]
        with working(stack, reports=WorkerReports(stack.store.engine)):
            wait_for(lambda: client.get("/readyz").status_code == 200)
            assert client.get("/readyz").json() == {"status": "ready", "checks": {"database": "ok", "workers": "ok"}}
        assert client.get("/readyz").status_code == 503


def test_a_database_that_fails_or_hangs_makes_unready_soon(serve: Serve, monkeypatch) -> None:
    """Whatever the database does, the question is answered; and the process is still alive."""
    with serve() as stack:
        client = stack.client(key="")
        reports = stack.app.state.service.reports
        monkeypatch.setattr("impasto.api.health.ANSWER_SECONDS", 0.2)
        monkeypatch.setattr(reports, "seen", lambda: time.sleep(1))
        start = time.monotonic()
        for _ in range(4):  # more than may ask at once
            assert "has not answered" in client.get("/readyz").json()["checks"]["database"]
        assert time.monotonic() - start < 2
        assert client.get("/healthz").status_code == 200
        monkeypatch.undo()
        time.sleep(1)
        with stack.store.engine.begin() as db:
            db.exec_driver_sql("alter table workers rename to elsewhere")
        assert client.get("/readyz").json()["checks"]["database"] == "cannot answer"
        assert value(scrape(client), "impasto_database_up") == 0


def test_metrics_tell_of_queue_jobs_workers_and_requests(serve: Serve) -> None:
    """What an operator asks first: how long is the queue, what became of jobs, how fast, how full, how big."""
    with serve() as stack:
        client = stack.client()
        jobs = [submit(client, num_inference_steps=4, num_images=2)["id"] for _ in range(3)]
        time.sleep(0.05)
        before = scrape(client)
        assert value(before, "impasto_queue_jobs", pool="default") == 3
        assert 0 < value(before, "impasto_queue_oldest_seconds", pool="default") < 30

        reports = WorkerReports(stack.store.engine)
        with working(stack, 0.02, reports=reports, name="gpu-box-1", slots=2) as loop:
            for job_id in jobs:
                assert client.get(f"/api/v3/predictions/{job_id}?wait=20").json()["data"]["status"] == "completed"
            assert client.post("/api/v3/no/such", json={}).status_code == 404
            assert client.request("PROPFIND", "/api/v3/a/secret/path").status_code == 405
            loop._heart._reported = 0  # report with the next beat
            wait_for(lambda: value(scrape(client), "impasto_jobs_total", outcome="completed") == 3)
            after = scrape(client)

        assert value(after, "impasto_queue_jobs", pool="default") == 0
        assert value(after, "impasto_worker_up", worker="gpu-box-1", host="gpu-box", device="none") == 1
        assert value(after, "impasto_images_total", worker="gpu-box-1") == 6
        steps = value(after, "impasto_step_seconds_count", worker="gpu-box-1")
        assert 4 <= steps <= 12
        assert value(after, "impasto_batch_images_sum") / steps >= 2, "two images a job"
        assert value(after, "impasto_stage_seconds_count", stage="total") == 3
        assert value(after, "impasto_stage_seconds_count", stage="queue") == 3
        assert value(after, "impasto_memory_bytes", kind="process") > 1e6
        read = "/api/v3/predictions/{prediction_id}"
        assert value(after, "impasto_http_requests_total", route=read, status="200", method="GET") == 3
        assert value(after, "impasto_http_request_seconds_count", route=read) == 3
        assert value(after, "impasto_http_requests_total", method="other") == 1
        text = client.get("/metrics").text
        assert "red fox" not in text and "secret" not in text and stack.key not in text
        assert not any(job_id in text for job_id in jobs)


def test_workers_stand_side_by_side_and_the_silent_are_forgotten(serve: Serve) -> None:
    """One family, a series for each worker; who has been silent too long is not shown, nor counted as there."""
    with serve() as stack:
        client, reports = stack.client(), WorkerReports(stack.store.engine)
        family = {"name": "impasto_images", "type": "counter", "help": "Pictures.", "samples": []}
        for name, images in (("a", 1), ("b", 2), ("c", 3)):
            stats = [family | {"samples": [["impasto_images_total", {}, images]]}]
            reports.report(WorkerReport(name, "host", "cuda:0", "default", stats))
        with stack.store.engine.begin() as db:
            db.exec_driver_sql("update workers set seen_at = seen_at - 60000 where id = 'b'")
            db.exec_driver_sql("update workers set seen_at = seen_at - 600000 where id = 'c'")
        reports.report(WorkerReport("a", "host", "cuda:0", "default", stats))
        shown = scrape(client)
        assert [value(shown, "impasto_images_total", worker=name) for name in ("a", "b")] == [3, 2]
        assert value(shown, "impasto_worker_up", worker="a") == 1
        assert value(shown, "impasto_worker_up", worker="b") == 0
        assert 59 < value(shown, "impasto_worker_silent_seconds", worker="b") < 90
        assert {sample.labels["worker"] for sample in shown["impasto_worker_up"].samples} == {"a", "b"}
        assert reports.seen() == 1
        reports.remove("a")
        assert client.get("/readyz").status_code == 503


@pytest.mark.parametrize(("metrics", "without", "with_key"), [("open", 200, 200), ("key", 401, 200), ("off", 404, 404)])
def test_who_may_read_is_a_setting(serve: Serve, metrics: str, without: int, with_key: int) -> None:
    """Everybody, whoever has a key, or nobody."""
    with serve(metrics=metrics) as stack:
        for client, status in ((stack.client(key=""), without), (stack.client(), with_key)):
            answer = client.get("/metrics")
            assert answer.status_code == status
            if status != 200:
                refusal(answer, status)


def test_the_docs_have_every_metric_and_no_other(serve: Serve) -> None:
    """Name, type and labels in docs/metrics.md are what /metrics gives."""
    rows = re.findall(r"^\| `(impasto_\w+)` \| (\w+) \| ([\w, ]*) \|", DOCS.read_text(), re.MULTILINE)
    parts = DOCS.read_text().split("## Of each worker")
    documented = {}
    for name, kind, labels in rows:
        named = {label for label in labels.replace(" ", "").split(",") if label}
        documented[name.removesuffix("_total")] = (kind, named | ({"worker"} if f"`{name}`" in parts[1] else set()))
    with serve() as stack:
        client = stack.client()
        with working(stack, reports=WorkerReports(stack.store.engine)):
            wait_for(lambda: "impasto_jobs" in scrape(client))
            found = scrape(client)
    given = {
        name: (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
        for name, family in found.items()
        if name.startswith("impasto_")
    }
    assert given == documented
