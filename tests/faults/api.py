"""``impasto serve`` that dies at a chosen point of its first submit: ``python -m tests.faults.api POINT serve …``."""

from __future__ import annotations

import sys
from typing import Any

from impasto import cli, serving
from impasto.jobs.records import Job, NewJob
from impasto.jobs.store import JobStore
from tests.faults.dying import die


class BeforeCommit(JobStore):
    """Dies when the rows are written and not yet committed."""

    def _insert(self, *arguments: Any) -> Job:
        super()._insert(*arguments)
        die()


class AfterCommit(JobStore):
    """Dies when the rows are committed and nobody was told."""

    def create(self, job: NewJob, *arguments: Any, **options: Any) -> Job:
        super().create(job, *arguments, **options)
        die()


if __name__ == "__main__":
    point = sys.argv.pop(1)
    serving.JobStore = {"before_commit": BeforeCommit, "after_commit": AfterCommit}[point]  # type: ignore[misc]
    cli.main()
