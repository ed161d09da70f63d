"""The worker process: reads the settings, loads the model, runs the loop until told to stop.

Knows settings and which backend a model name means. The only place in ``worker`` that imports torch, and only when
it runs. Ends at SIGTERM, SIGINT, or when its parent is gone (its standard input closes).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from functools import partial
from typing import Any, Final

from impasto.config import Settings
from impasto.errors import ConfigError, ImpastoError
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore
from impasto.jobs.workers import WorkerReports
from impasto.logs import set_up_logging
from impasto.models.catalog import motion_adapter
from impasto.safety.denylist import DenyList
from impasto.safety.gate import SafetyGate
from impasto.safety.table import make_checker
from impasto.worker.backend import Backend, FakeBackend
from impasto.worker.loop import WorkerLoop
from impasto.worker.loras import LoraLibrary
from impasto.worker.naming import EXIT_CONFIG, EXIT_STALLED, FAKE_MODEL
from impasto.worker.provenance import Provenance
from impasto.worker.pulse import start_pulse
from impasto.worker.uploads import UploadedLoras

DATABASE_SECONDS: Final = 300.0  # to wait for a database at the start; the supervisor or the system starts us again
log = logging.getLogger(__name__)


def make_backend(settings: Settings) -> Backend:
    """Build what the setting ``model`` names."""
    if settings.model == FAKE_MODEL:
        return FakeBackend(settings.fake_step_seconds)
    from impasto.animate.animator import Animator
    from impasto.animate.turns import TakingTurns
    from impasto.engine.accel import Accel
    from impasto.engine.engine import Engine

    engine = Engine.load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        max_batch=settings.max_batch,
        refiner=settings.refiner,
        accel=Accel.parse(settings.accel),
        lora_memory_bytes=settings.lora_memory_bytes,
        lora_switch_bytes=settings.lora_switch_bytes,
    )
    return TakingTurns(engine, partial(Animator, engine, motion_adapter(settings.motion_adapter, settings.model)))


def make_safety(settings: Settings) -> SafetyGate:
    """Load the checker and the deny-list that the settings name.

    Raises:
        ConfigError: The checker is on and its weights are missing or wrong, or the list cannot be read.
    """
    return SafetyGate(
        make_checker(settings.safety_checker, settings.safety_threshold, settings.safety_device),
        action=settings.safety_action,
        allow_disable=settings.safety_allow_disable,
        check_inputs=settings.safety_check_inputs,
        previews=settings.safety_previews,
        seconds=settings.safety_timeout,
        denylist=DenyList.load(settings.prompt_denylist) if settings.prompt_denylist else DenyList(),
    )


def make_loop(
    settings: Settings,
    backend: Backend,
    name: str,
    safety: SafetyGate | None = None,
    provenance: Provenance | None = None,
) -> WorkerLoop:
    """Open the store and build the loop around a backend; ``name`` is unique among all workers."""
    database = open_database(settings.database)
    upgrade(database, DATABASE_SECONDS)
    outputs = OutputStore(settings.output_root)
    return WorkerLoop(
        JobStore(database),
        outputs,
        backend,
        name=name,
        lora_dir=settings.lora_dir,
        slots=settings.max_batch,
        lease_seconds=settings.lease_seconds,
        max_attempts=settings.max_attempts,
        on_stall=lambda: os._exit(EXIT_STALLED),
        loras=LoraLibrary.of(settings, UploadedLoras.of(settings, database, outputs).find),
        previews=settings.previews,
        reports=WorkerReports(database),
        safety=safety or make_safety(settings),
        provenance=provenance or Provenance.of(settings, backend.device),
        drain_seconds=settings.drain_seconds,
    )


def run(settings: Settings, name: str, *, stop_with_parent: bool = False) -> int:
    """Run a worker until it is told to stop; return the process's exit status."""
    log.info("loading model %s", settings.model)
    try:
        safety = make_safety(settings)
        backend = make_backend(settings)
        provenance = Provenance.of(settings, backend.device)
    except ImpastoError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    loop = make_loop(settings, backend, name, safety, provenance)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.stop())
    if stop_with_parent:
        threading.Thread(target=_stop_at_end_of_input, args=(loop,), name="parent-watch", daemon=True).start()
    log.info("model %s loaded; taking jobs", settings.model)
    loop.run()
    return 0


def _stop_at_end_of_input(loop: Any) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read(): it holds a lock that the exit would wait for
        pass
    loop.stop()


if __name__ == "__main__":
    try:
        loaded = Settings.load()
    except ConfigError as problem:
        sys.exit(str(problem))
    set_up_logging(loaded.log_level, loaded.log_format)
    worker_name, pulse, *_ = [*sys.argv[1:], ""]
    if pulse:
        start_pulse(int(pulse))
    sys.exit(run(loaded, worker_name, stop_with_parent=True))
