"""Making LoRA files ready while their job waits, on its own thread, so that its start holds up nobody.

Knows files, and whom to ask to make them ready. Knows nothing of what is in them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from impasto.errors import ImpastoError
from impasto.types import GenerationRequest

if TYPE_CHECKING:
    from impasto.worker.running import Running

CHUNK: Final = 2**20  # bytes read at a time; the interpreter is free for others while the disk works

log = logging.getLogger(__name__)

Preload = Callable[[GenerationRequest, Callable[[], bool]], object]


class Warming:
    """Has the files of waiting jobs made ready.

    Args:
        preload: Makes a request's files ready, from any thread, until its second argument says that nobody waits.
    """

    def __init__(self, preload: Preload) -> None:
        self._preload = preload

    def warm(self, running: Running, request: GenerationRequest) -> None:
        """Make a job's files ready, if it still wants them.

        Errors are left to its start, which meets them again, where they are that job's alone. So is a suspect: what
        ends workers shall do so while nobody else is there.
        """
        if running.suspect or running.ended.is_set() or not request.loras:
            return
        try:
            self._preload(request, running.ended.is_set)
        except ImpastoError as error:
            log.debug("job %s: %s", running.job.id, error)
        except Exception:  # the start of the job will tell, or go well
            log.exception("job %s: its files could not be made ready", running.job.id)


def read_ahead(file: Path) -> int:
    """Read a file once, into the system's cache; return the bytes. Errors are left to whoever parses it."""
    read = 0
    buffer = bytearray(CHUNK)
    try:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                read += count
    except OSError:
        pass
    return read
