"""What a worker counts: jobs, steps, stages, batches, LoRA switches, memory.

Knows metrics and how they are written as JSON for a row of the database. Knows nothing of who reads them: the API puts
them under ``/metrics`` with the worker's name, so they need no port of the worker's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from impasto.types import Event, Finished, Progress

Families = list[dict[str, Any]]

SECONDS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
IMAGES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
OUTCOMES: Final = ("completed", "failed", "cancelled", "released", "lost")
STAGES: Final = ("queue", "fetch", "encode", "denoise", "decode", "store", "total")
_STATUS: Final = Path("/proc/self/status")


class WorkerStats:
    """Counters since the worker's start. The loop's thread counts; any thread may take a ``snapshot``."""

    def __init__(self, slots: int) -> None:
        registry = self._registry = CollectorRegistry()
        self._jobs = Counter("impasto_jobs", "Attempts at jobs that ended, by how.", ["outcome"], registry=registry)
        self._reaped = Counter(
            "impasto_reaped", "Jobs this worker took from workers that fell silent.", registry=registry
        )
        self._images = Counter("impasto_images", "Pictures stored.", registry=registry)
        self._steps = Histogram(
            "impasto_step_seconds", "Time of one denoising step of a batch.", buckets=SECONDS, registry=registry
        )
        self._batch = Histogram(
            "impasto_batch_images", "Images that moved in one step.", buckets=IMAGES, registry=registry
        )
        self._stages = Histogram(
            "impasto_stage_seconds", "Time of a job's stages.", ["stage"], buckets=SECONDS, registry=registry
        )
        self._running = Gauge("impasto_worker_jobs", "Jobs the worker holds, by state.", ["state"], registry=registry)
        self._slots = Gauge("impasto_worker_slots", "Jobs the worker can run at once.", registry=registry)
        self._slots.set(slots)
        self._usage: Mapping[str, float] = {}
        registry.register(self)
        for outcome in OUTCOMES:  # all series from the start, at 0, so that their first growth is seen as one
            self._jobs.labels(outcome)
        for stage in STAGES:
            self._stages.labels(stage)

    def ended(self, outcome: str, times: int = 1) -> None:
        """Count attempts at jobs that ended; ``outcome`` is one of ``OUTCOMES``."""
        self._jobs.labels(outcome).inc(times)

    def reaped(self, jobs: int) -> None:
        """Count jobs that were taken from workers that fell silent."""
        self._reaped.inc(jobs)

    def stage(self, name: str, seconds: float) -> None:
        """Count the time of a stage of one job; ``name`` is one of ``STAGES``."""
        self._stages.labels(name).observe(max(0.0, seconds))

    def stored(self, seconds: float) -> None:
        """Count a picture that was encoded and stored."""
        self._images.inc()
        self.stage("store", seconds)

    def moved(self, events: Sequence[Event]) -> None:
        """Count a step once, though every request in it reports progress."""
        progress = next((event for event in events if isinstance(event, Progress)), None)
        if progress is not None:
            self.stepped(progress)

    def stepped(self, progress: Progress) -> None:
        """Count one step of a batch, told by the report of any request in it."""
        self._steps.observe(progress.seconds)
        self._batch.observe(progress.batch)

    def finished(self, event: Finished) -> None:
        """Count the stages of a request inside the engine."""
        for name, seconds in event.stages.items():
            if name in STAGES:
                self.stage(name, seconds)

    def note(self, running: int, fetching: int, usage: Mapping[str, float]) -> None:
        """Note what the worker holds now and what its backend says of itself."""
        self._running.labels("running").set(running)
        self._running.labels("fetching").set(fetching)
        self._usage = usage

    def snapshot(self) -> Families:
        """Return all metrics as JSON values: name, type, help and samples (name, labels, value) of each family."""
        return [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                "samples": [
                    [sample.name, sample.labels, sample.value]
                    for sample in family.samples
                    if not sample.name.endswith("_created")
                ],
            }
            for family in self._registry.collect()
        ]

    def collect(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
        """Return the families that are read rather than counted here: the backend's own and the process's memory."""
        usage = self._usage
        cache = CounterMetricFamily(
            "impasto_lora_cache", "LoRA sets wanted on a network, by whether they were ready.", labels=["result"]
        )
        memory = GaugeMetricFamily(
            "impasto_memory_bytes", "Memory of the worker: process, loras, device, device_reserved.", labels=["kind"]
        )
        for result in ("hits", "misses"):
            cache.add_metric([result], usage.get(f"lora_cache_{result}", 0))
        held = {"process": _resident(), "loras": usage.get("lora_bytes", 0)}
        held |= {kind: usage[f"{kind}_bytes"] for kind in ("device", "device_reserved") if f"{kind}_bytes" in usage}
        for kind, value in held.items():
            memory.add_metric([kind], value)
        return [
            CounterMetricFamily(
                "impasto_lora_switches", "Changes of a network's LoRAs.", value=usage.get("lora_switches", 0)
            ),
            CounterMetricFamily(
                "impasto_lora_switch_seconds", "Time they took.", value=usage.get("lora_switch_seconds", 0)
            ),
            cache,
            memory,
        ]


def _resident() -> float:
    """Bytes of memory this process holds now (proc_pid_status(5)); 0 where the system does not say."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0.0)
