"""Polls that come together share a read of the store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection
from datetime import UTC, datetime

import pytest

from impasto.api.shared_reads import SharedReads
from impasto.errors import NotFound, Unavailable
from impasto.jobs.records import Job
from impasto.jobs.states import Status

IDS = [f"{number:032x}" for number in range(50)]


def job(job_id: str, key_id: str = "mine") -> Job:
    """A waiting job."""
    row = dict.fromkeys(Job.__dataclass_fields__)
    known = {"id": job_id, "key_id": key_id, "status": Status.CREATED, "created_at": datetime.now(UTC)}
    return Job(**(row | known))  # type: ignore[arg-type]


class Shelf:
    """Jobs, and what was asked for; the first read lasts until it is let go."""

    def __init__(self) -> None:
        self.asked: list[set[str]] = []
        self.go = threading.Event()

    def read(self, ids: Collection[str]) -> dict[str, Job]:
        """Return all that is asked for but the last."""
        self.asked.append(set(ids))
        self.go.wait(10)
        return {job_id: job(job_id) for job_id in ids if job_id != IDS[-1]}


async def soon(shelf: Shelf, reads: int) -> None:
    """Wait until so many reads have begun."""
    while len(shelf.asked) < reads:
        await asyncio.sleep(0.001)


def test_those_who_ask_during_a_read_share_the_next() -> None:
    """A read that has begun may be too old for who asks now; one more serves all of them."""

    async def run() -> None:
        shelf = Shelf()
        reads = SharedReads(shelf.read)
        first = asyncio.create_task(reads.get(IDS[0], "mine"))
        await soon(shelf, 1)
        others = [asyncio.create_task(reads.get(job_id, "mine")) for job_id in [IDS[0], *IDS[1:40]]]
        await asyncio.sleep(0.02)
        assert len(shelf.asked) == 1
        shelf.go.set()
        found = await asyncio.gather(first, *others)
        assert [job.id for job in found] == [IDS[0], IDS[0], *IDS[1:40]]
        assert shelf.asked == [{IDS[0]}, set(IDS[:40])]

    asyncio.run(run())


def test_one_who_goes_away_leaves_the_others_their_read() -> None:
    """A dropped connection cancels its own request and no read."""

    async def run() -> None:
        shelf = Shelf()
        reads = SharedReads(shelf.read)
        gone, stays = (asyncio.create_task(reads.get(job_id, "mine")) for job_id in IDS[:2])
        await soon(shelf, 1)
        gone.cancel()
        shelf.go.set()
        assert (await stays).id == IDS[1]
        assert (await reads.get(IDS[2], "mine")).id == IDS[2]

    asyncio.run(run())


@pytest.mark.parametrize(("job_id", "key_id"), [(IDS[-1], "mine"), (IDS[0], "another"), ("no id", "mine")])
def test_what_is_not_the_keys_is_not_there(job_id: str, key_id: str) -> None:
    """A missing job, another key's and something that is no id look the same."""
    shelf = Shelf()
    shelf.go.set()
    with pytest.raises(NotFound):
        asyncio.run(SharedReads(shelf.read).get(job_id, key_id))


def test_a_database_that_is_away_is_told_to_everybody_who_asked() -> None:
    """And the next who ask try anew."""

    def away(ids: Collection[str]) -> dict[str, Job]:
        raise Unavailable("away")

    async def run() -> None:
        reads = SharedReads(away)
        for _ in range(2):
            told = await asyncio.gather(*(reads.get(job_id, "mine") for job_id in IDS[:3]), return_exceptions=True)
            assert [type(error) for error in told] == [Unavailable] * 3

    asyncio.run(run())
