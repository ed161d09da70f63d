"""What the store of finished answers promises: made once, never too many, never a wrong one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from impasto.api.finished import FinishedAnswers


def test_an_answer_is_made_once_however_many_want_it():
    """Those that come while it is made wait for it."""
    answers, made, start = FinishedAnswers(100), [], threading.Barrier(8)

    def make() -> bytes:
        made.append(1)
        threading.Event().wait(0.05)
        return b"answer"

    def want(_: int) -> bytes:
        start.wait()
        return answers.get("a", make)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(want, range(8))) == {b"answer"}
    assert len(made) == 1


def test_two_answers_are_made_side_by_side():
    """A slow one does not hold up another."""
    answers, both = FinishedAnswers(100), threading.Barrier(2, timeout=5)

    def make() -> bytes:
        both.wait()
        return b"x"

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda key: answers.get(key, make), "ab")) == [b"x", b"x"]


def test_the_longest_unused_goes_first_and_the_bytes_stay_under_the_limit():
    """Asking for one keeps it."""
    answers = FinishedAnswers(30)
    for key in "abc":
        answers.get(key, lambda: bytes(10))
    answers.get("a", pytest.fail)
    answers.get("d", lambda: bytes(10))
    assert answers.size == 30
    answers.get("a", pytest.fail)
    again = []
    answers.get("b", lambda: again.append(1) or bytes(10))
    assert again


def test_one_that_is_larger_than_all_is_given_and_not_kept():
    """Nothing else is thrown out for it."""
    answers = FinishedAnswers(30)
    answers.get("a", lambda: bytes(10))
    assert len(answers.get("b", lambda: bytes(31))) == 31
    assert answers.size == 10
    answers.get("a", pytest.fail)


def test_one_that_could_not_be_made_is_tried_again():
    """The error is its caller's."""
    answers = FinishedAnswers(30)
    with pytest.raises(ZeroDivisionError):
        answers.get("a", lambda: bytes(1 // 0))
    assert answers.get("a", lambda: b"x") == b"x"
