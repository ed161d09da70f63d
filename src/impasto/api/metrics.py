"""Numbers for Prometheus: ``GET /metrics``.

Knows where numbers come from: this process's own (``traffic.py``, followers), what the database tells (queue, workers),
and the workers' own counters, which they leave in the database, side by side under the label ``worker``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from impasto.api.auth import caller
from impasto.api.schemas import responses
from impasto.api.service import Service, ServiceDep
from impasto.config import Settings
from impasto.errors import Unavailable
from impasto.jobs.workers import SEEN_SECONDS, Queue, WorkerReport


class Sources:
    """Everything that one scrape shows, as a collector."""

    def __init__(self, *sources: Callable[[], Iterable[Metric]]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """Yield each source's families."""
        for source in self._sources:
            yield from source()


async def metrics(service: ServiceDep) -> Response:
    """Return the numbers in Prometheus' text format."""
    return Response(await run_in_threadpool(_text, service), media_type=CONTENT_TYPE_LATEST)


def _text(service: Service) -> bytes:
    """Gather and write everything; in a thread, because it asks the database."""
    try:
        found = _of_database(service.reports.queues(), service.reports.list())
    except Unavailable:  # what this process knows is still worth showing
        found = [_gauge("impasto_database_up", "Whether the database answers.", 0.0)]
    streams = _gauge(
        "impasto_followers", "Requests that follow a prediction or wait for its end.", len(service.listeners)
    )
    shown = Sources(service.traffic.collect, lambda: [streams], lambda: found)
    return generate_latest(shown)


def _of_database(queues: Sequence[Queue], workers: Sequence[WorkerReport]) -> list[Metric]:
    waiting = GaugeMetricFamily("impasto_queue_jobs", "Jobs that wait for a worker.", labels=["pool"])
    oldest = GaugeMetricFamily("impasto_queue_oldest_seconds", "Age of the oldest of them; 0: none.", labels=["pool"])
    running = GaugeMetricFamily("impasto_running_jobs", "Jobs that workers hold.", labels=["pool"])
    for queue in queues:
        waiting.add_metric([queue.pool], queue.waiting)
        oldest.add_metric([queue.pool], queue.oldest)
        running.add_metric([queue.pool], queue.running)
    about = ["worker", "host", "device", "pool"]
    up = GaugeMetricFamily("impasto_worker_up", f"Whether it was heard in the last {SEEN_SECONDS:g} s.", labels=about)
    silent = GaugeMetricFamily("impasto_worker_silent_seconds", "Time since it was heard.", labels=["worker"])
    for worker in workers:
        up.add_metric([worker.id, worker.host, worker.device, worker.pool], float(worker.silent <= SEEN_SECONDS))
        silent.add_metric([worker.id], worker.silent)
    answers = _gauge("impasto_database_up", "Whether the database answers.", 1.0)
    return [answers, waiting, oldest, running, up, silent, *_of_workers(workers)]


def _of_workers(workers: Sequence[WorkerReport]) -> list[Metric]:
    """Put the workers' own families beside each other; they come as JSON from the database."""
    families: dict[str, Metric] = {}
    for worker in workers:
        for told in worker.stats:
            family = families.setdefault(told["name"], Metric(told["name"], told["help"], told["type"]))
            for name, labels, value in told["samples"]:
                family.add_sample(name, labels | {"worker": worker.id}, value)
    return list(families.values())


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)


def router(settings: Settings) -> APIRouter:
    """Return the route, or none: the setting ``metrics`` says who may read it."""
    routes = APIRouter(tags=["health"])
    if settings.metrics == "off":
        return routes
    closed = settings.metrics == "key"
    kind = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    routes.add_api_route(
        "/metrics",
        metrics,
        methods=["GET"],
        summary="Numbers for Prometheus",
        dependencies=[Depends(caller)] if closed else [],
        response_class=Response,
        responses={200: kind, **(responses(401) if closed else {})},
    )
    return routes
