"""The choice of rows: property tests over random schedules, and the promises by name."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from impasto.engine.scheduler import PATIENCE, Scheduler

jobs = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=12)


@given(jobs, st.integers(1, 5))
def test_every_row_runs_exactly_its_steps(rows, max_batch):
    """Whatever the mix, each row moves as often as it has steps, and then the scheduler is empty."""
    scheduler = Scheduler(max_batch)
    for row_id, (bucket, steps) in enumerate(rows):
        scheduler.add(row_id, bucket, steps)
    moved = Counter()
    while chosen := scheduler.next_rows():
        moved.update(chosen)
    assert moved == {row_id: steps for row_id, (_, steps) in enumerate(rows)}
    assert len(scheduler) == 0


@given(jobs, st.integers(1, 5))
def test_a_turn_moves_one_bucket_within_the_batch_limit(rows, max_batch):
    """Rows that share a call agree in everything that must agree, and are never more than the limit."""
    scheduler = Scheduler(max_batch)
    for row_id, (bucket, steps) in enumerate(rows):
        scheduler.add(row_id, bucket, steps)
    while chosen := scheduler.next_rows():
        assert len({rows[row_id][0] for row_id in chosen}) == 1
        assert len(chosen) <= max_batch


def test_short_jobs_overtake_long_ones():
    """A 4-step job that arrives behind a 50-step job finishes long before it."""
    scheduler = Scheduler(max_batch=1)
    scheduler.add(0, "a", 50)
    scheduler.next_rows()
    scheduler.add(1, "a", 4)
    turns = [scheduler.next_rows() for _ in range(5)]
    assert turns[:4] == [[1]] * 4
    assert turns[4] == [0]


def test_rows_of_one_bucket_share_a_call():
    """Four alike rows move together."""
    scheduler = Scheduler(max_batch=4)
    for row_id in range(4):
        scheduler.add(row_id, "a", 3)
    assert sorted(scheduler.next_rows()) == [0, 1, 2, 3]


def test_a_cancelled_row_is_gone_by_the_next_turn():
    """Discarded rows are never chosen again; unknown ones are fine."""
    scheduler = Scheduler(max_batch=4)
    scheduler.add(0, "a", 3)
    scheduler.add(1, "a", 3)
    scheduler.next_rows()
    scheduler.discard([0, 99])
    assert scheduler.next_rows() == [1]


@pytest.mark.parametrize("remaining", [0, -1])
def test_a_row_with_nothing_to_do_is_refused(remaining):
    """A row needs at least one step."""
    with pytest.raises(ValueError, match="nothing left"):
        Scheduler(1).add(0, "a", remaining)


def test_a_row_is_added_once():
    """The same id twice is a mistake of the caller."""
    scheduler = Scheduler(1)
    scheduler.add(0, "a", 1)
    with pytest.raises(ValueError, match="already here"):
        scheduler.add(0, "b", 1)


class Waiting(RuleBasedStateMachine):
    """Rows come, move and are cancelled in any order; nobody waits beyond the bound."""

    MOST_ROWS = 10

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(max_batch=2)
        self.waited: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.ids = 0

    @precondition(lambda self: len(self.left) < self.MOST_ROWS)
    @rule(bucket=st.sampled_from("abcd"), steps=st.integers(1, 30))
    def arrive(self, bucket, steps):
        self.scheduler.add(self.ids, bucket, steps)
        self.left[self.ids], self.waited[self.ids] = steps, 0
        self.ids += 1

    @rule()
    def turn(self):
        chosen = self.scheduler.next_rows()
        assert bool(chosen) == bool(self.left)
        for row_id in self.left:
            self.waited[row_id] += 1
        for row_id in chosen:
            self.waited[row_id] = 0
            self.left[row_id] -= 1
            if not self.left[row_id]:
                del self.left[row_id]

    @precondition(lambda self: self.left)
    @rule(data=st.data(), bucket=st.sampled_from("abcd"))
    def change_stage(self, data, bucket):
        self.scheduler.move(data.draw(st.sampled_from(sorted(self.left))), bucket)

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def cancel(self, data):
        row_id = data.draw(st.sampled_from(sorted(self.left)))
        self.scheduler.discard([row_id])
        del self.left[row_id]

    @invariant()
    def nobody_starves(self):
        assert all(self.waited[row_id] <= PATIENCE + self.MOST_ROWS for row_id in self.left)


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=60, stateful_step_count=80, deadline=None)
