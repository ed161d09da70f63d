"""Polls are answered while submits wait: for the one write lock of SQLite, or behind each other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from impasto.jobs.database import writing

from .conftest import MODEL, Stack, read, submit

SUBMITS = 40  # more than the service has threads


def test_submits_that_wait_for_the_store_leave_polls_alone(stack: Stack, http: httpx.Client) -> None:
    """Somebody holds the write lock for a while; every poll is quick all the same, and no submit is lost."""
    prediction, locked, done = submit(http), threading.Event(), threading.Event()

    def hold() -> None:
        with writing(stack.store.engine):
            locked.set()
            done.wait(20)

    def post(number: int) -> int:
        with httpx.Client(headers=dict(http.headers), trust_env=False, timeout=30) as client:
            return client.post(f"{stack.url}/api/v3/{MODEL}", json={"prompt": f"fox {number}"}).status_code

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert locked.wait(10)
        with ThreadPoolExecutor(SUBMITS) as pool:
            posts = [pool.submit(post, number) for number in range(SUBMITS)]
            time.sleep(1)
            began = time.monotonic()
            for _ in range(10):
                read(http, prediction)
            waited = time.monotonic() - began
            assert not any(answer.done() for answer in posts), "the submits do wait"
            done.set()
            assert [answer.result() for answer in posts] == [200] * SUBMITS
    finally:
        done.set()
        holder.join()
    assert waited < 3
