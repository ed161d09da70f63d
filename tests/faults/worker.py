"""``impasto worker`` that dies, hangs or lingers at a chosen point: ``python -m tests.faults.worker POINT worker …``.

Each fault strikes the first attempt at a job, but ``poison``, which strikes each one at a job whose prompt says so.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from impasto import cli
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Job, Lease
from impasto.jobs.store import JobStore
from impasto.types import Event, GenerationRequest
from impasto.worker import process
from impasto.worker.backend import FakeBackend
from tests.faults.dying import die

MARK = "poison"  # in the prompt of a job that kills its worker
HUNG = "wedge"  # in the prompt of a job that hangs it
first_attempts: set[str] = set()


class Noting(JobStore):
    """Notes which jobs are at their first attempt."""

    def claim(self, *arguments: Any, **options: Any) -> list[Job]:
        """Claim."""
        jobs = super().claim(*arguments, **options)
        first_attempts.update(job.id for job in jobs if job.attempt == 1)
        return jobs


class AfterClaim(Noting):
    """Dies holding jobs that it has not looked at."""

    def claim(self, *arguments: Any, **options: Any) -> list[Job]:
        """Claim and die."""
        jobs = super().claim(*arguments, **options)
        return die() if any(job.attempt == 1 for job in jobs) else jobs


class BeforeComplete(Noting):
    """Dies with all pictures stored, before the end is written."""

    def complete(self, lease: Lease, *arguments: Any) -> bool:
        """Die or complete."""
        return die() if lease.attempt == 1 else super().complete(lease, *arguments)


class AfterComplete(Noting):
    """Dies with the end written, before anything else is done."""

    def complete(self, lease: Lease, *arguments: Any) -> bool:
        """Complete and die."""
        done = super().complete(lease, *arguments)
        return die() if lease.attempt == 1 else done


class AfterPut(OutputStore):
    """Dies when the first of several pictures is stored."""

    def put(self, job_id: str, attempt: int, *arguments: Any) -> str:
        """Store and die."""
        blob = super().put(job_id, attempt, *arguments)
        return die() if attempt == 1 else blob


class Backend(FakeBackend):
    """Dies or hangs in the middle of a job, if told to."""

    mid_step = False

    def step(self) -> list[Event]:
        """Move, die or hang."""
        events = super().step()
        for request_id, (request, done) in list(self._requests.items()):
            if done >= 2:
                self._strike(request_id, request)
        return events

    def _strike(self, request_id: str, request: GenerationRequest) -> None:
        if MARK in request.prompt or (self.mid_step and request_id in first_attempts):
            die()
        if HUNG in request.prompt and request_id in first_attempts:
            time.sleep(10**6)


class MidStep(Backend):
    """Dies in the middle of every first attempt."""

    mid_step = True


FAULTS: dict[str, dict[str, Any]] = {
    "after_claim": {"JobStore": AfterClaim},
    "mid_step": {"FakeBackend": MidStep},
    "after_put": {"OutputStore": AfterPut},
    "before_complete": {"JobStore": BeforeComplete},
    "after_complete": {"JobStore": AfterComplete},
    "marked": {"FakeBackend": Backend},
}

if __name__ == "__main__":
    process.JobStore = Noting  # type: ignore[misc]
    for name, fault in FAULTS[sys.argv.pop(1)].items():
        setattr(process, name, fault)
    cli.main()
