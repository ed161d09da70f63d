"""What every route needs at hand: settings, the stores, and the waiting room.

Knows how to get these from a request. Knows nothing of any route.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from impasto.api.auth import KeyCheck
from impasto.api.pictures import PictureSource
from impasto.api.waiting import Changes
from impasto.config import Settings
from impasto.jobs.outputs import OutputStore
from impasto.jobs.store import JobStore


@dataclass(frozen=True, slots=True)
class Service:
    """The parts behind one application; made once by ``create_app``."""

    settings: Settings
    store: JobStore
    outputs: OutputStore
    key_check: KeyCheck
    changes: Changes
    pictures: PictureSource
    readers: CapacityLimiter  # threads that read bodies, pictures among them


def service_of(request: Request) -> Service:
    """Return the parts of the application that took ``request``."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(service_of)]
