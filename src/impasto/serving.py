"""``impasto serve``: the API in this process and supervised workers beside it.

Knows how the rooms are put together to run on one machine. Holds no logic of the rooms, and imports no torch.
"""

from __future__ import annotations

import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

from impasto.api.app import create_app
from impasto.api.server import Server, server_config
from impasto.config import Settings
from impasto.errors import ConfigError, ModelError
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore
from impasto.jobs.workers import WorkerReports
from impasto.logs import set_up_logging
from impasto.memory import give_back_large_blocks
from impasto.models.catalog import check_roles, find_model
from impasto.worker.devices import count_gpus, worker_devices
from impasto.worker.naming import FAKE_MODEL
from impasto.worker.supervisor import Supervisor

FIRST_KEY_NAME = "first"
BACKLOG = 2048
DATABASE_SECONDS = 60.0  # to wait for a database that starts together with us


def serve(settings: Settings) -> None:
    """Run the service until it is told to stop.

    Raises:
        ImpastoError: The model, the database or the address cannot be used: nothing is left running.
    """
    set_up_logging(settings.log_level, settings.log_format)
    give_back_large_blocks()
    if settings.model != FAKE_MODEL:
        check_roles(find_model(settings.model), None if settings.refiner is None else find_model(settings.refiner))
    settings.lora_dir.mkdir(parents=True, exist_ok=True)
    database = open_database(settings.database)
    upgrade(database, DATABASE_SECONDS)
    store, keys = JobStore(database), KeyStore(database)
    listener = _listen(settings)
    app = create_app(settings, store, keys, OutputStore(settings.output_root))
    server = Server(app, server_config(app, settings))
    hopeless: list[bool] = []

    def give_up() -> None:
        hopeless.append(True)
        server.should_exit = True

    def bury(worker: str) -> None:
        store.abandon(worker)
        WorkerReports(database).remove(worker)

    supervisors = [
        Supervisor(settings.model_copy(update={"device": device}), on_death=bury, on_hopeless=give_up)
        for device in worker_devices(settings.device, settings.workers, count_gpus())
    ]
    # uvicorn passes SIGTERM on to whoever had it before; by default that would end us before the worker is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _announce(listener, keys, settings)
    for supervisor in supervisors:
        supervisor.start()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        with ThreadPoolExecutor(max(1, len(supervisors))) as stopping:  # together: each may finish a step first
            list(stopping.map(Supervisor.stop, supervisors))
        database.dispose()
    if hopeless:
        raise ModelError(f"model {settings.model!r} cannot be run with these settings; the worker said why, above")


def _listen(settings: Settings) -> socket.socket:
    """Bind before anything else starts, so that a taken port is an error and port 0 is known."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from None
    listener.listen(BACKLOG)
    return listener


def _announce(listener: socket.socket, keys: KeyStore, settings: Settings) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Impasto is listening on http://{shown}:{port} (model: {settings.model})", file=sys.stderr, flush=True)
    if not keys.any():
        print(f"API key (shown this once): {keys.create(FIRST_KEY_NAME)}", file=sys.stderr, flush=True)
