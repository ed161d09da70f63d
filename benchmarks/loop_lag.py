"""The service with a probe in its event loop: ``python -m benchmarks.loop_lag``, started by ``benchmarks.api_load``.

Knows how to start the real service and to ask its loop, 200 times a second, how late a timer fires. Knows nothing of
load. A timer is late because the loop was busy, or because the processor was: the kernel tells how long a thread stood
ready without running (``/proc/…/schedstat``), and that part is written down beside each lateness.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fastapi import FastAPI

from impasto.api.app import create_app
from impasto.config import Settings
from impasto.serving import serve

FILE_VARIABLE = "API_LOAD_LAGS"  # names the file that the samples are written to
PERIOD = 0.005  # seconds between two timers


def run_queue_seconds(process: int, thread: int) -> float:
    """Return how long a thread has stood ready without running, since it began; 0 where the kernel does not tell."""
    try:
        return int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


async def probe(samples: list[tuple[float, float, float]]) -> None:
    """Note forever: the time, how late a timer was, and how much of that the thread waited for a processor."""
    me = (os.getpid(), threading.get_native_id())
    while True:
        began, waited = time.monotonic(), run_queue_seconds(*me)
        await asyncio.sleep(PERIOD)
        now = time.monotonic()
        samples.append((now, max(0.0, now - began - PERIOD), run_queue_seconds(*me) - waited))


def probed(app: FastAPI, file: Path) -> FastAPI:
    """Return the application with the probe in its lifespan; the samples are written when it ends."""
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(served: Any) -> AsyncIterator[Any]:
        samples: list[tuple[float, float, float]] = []
        task = asyncio.create_task(probe(samples))
        async with inner(served) as state:
            yield state
        task.cancel()
        file.write_text(json.dumps(samples))

    app.router.lifespan_context = lifespan
    return app


def main() -> None:
    """Run ``impasto serve`` with the probe, configured by the environment alone."""
    file = Path(os.environ[FILE_VARIABLE])
    with patch("impasto.serving.create_app", lambda *parts: probed(create_app(*parts), file)):
        serve(Settings.load())


if __name__ == "__main__":
    main()
