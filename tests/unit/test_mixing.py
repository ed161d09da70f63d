"""How patient rows are while LoRA sets take turns: switching keeps to its share, waiting to its bound."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.engine.mixing import MOST_PATIENCE, MOST_SHARE, SwitchCosts
from impasto.engine.scheduler import PATIENCE, Scheduler

seconds = st.floats(0, 1e9)
rows = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 30)), min_size=1, max_size=10)


def learnt(switch: float, step: float, share: float = MOST_SHARE) -> SwitchCosts:
    costs = SwitchCosts(share)
    costs.learn_switch(switch)
    costs.learn_step(step)
    return costs


@given(seconds, st.floats(1e-6, 1e4), st.floats(0.01, 0.9))
def test_the_stay_is_the_shortest_that_keeps_switching_within_its_share(switch, step, share):
    """k steps are enough, and k - 1 would not be."""
    k = learnt(switch, step, share).stay
    assert switch / (switch + k * step) <= share * (1 + 1e-9)
    assert k == 1 or switch / (switch + (k - 1) * step) >= share * (1 - 1e-9)


@given(seconds, seconds, st.integers(0, 1000))
def test_patience_keeps_to_its_bounds(switch, step, sets):
    """Never less than the scheduler's own, never more than the most, whatever was measured."""
    assert PATIENCE <= learnt(switch, step).patience(sets) <= MOST_PATIENCE


def test_one_set_alone_changes_nothing():
    """Nor do cheap switches, nor costs that are not known yet."""
    assert learnt(10, 1).patience(1) == PATIENCE
    assert learnt(0.1, 1).patience(4) == PATIENCE
    unknown = SwitchCosts()
    assert unknown.patience(4) == PATIENCE
    unknown.learn_switch(5)
    assert unknown.patience(4) == PATIENCE


def test_dear_switches_buy_patience():
    """A switch of 0.6 steps is worth a stay of 6: with four sets, 24 turns. Steps of no time: as much as allowed."""
    assert learnt(0.6, 1).stay == 6
    assert learnt(0.6, 1).patience(4) == 24
    assert learnt(1, 0).stay == math.inf and learnt(1, 0).patience(4) == MOST_PATIENCE


def test_one_slow_call_does_not_count():
    """The median of the latest measurements decides, so the first, compiling call changes nothing."""
    costs = SwitchCosts()
    for step in (60.0, 1.0, 1.0, 1.0):
        costs.learn_step(step)
    costs.learn_switch(1.0)
    assert costs.stay == 9


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1}, {"share": -0.5}, {"most_patience": PATIENCE - 1}])
def test_what_cannot_be_is_refused(wrong):
    """A share must lie between 0 and 1, and patience may not be cut below the scheduler's."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SwitchCosts(**wrong)


def run(jobs, max_batch: int, patience: int, apart: int = 0) -> tuple[list[str], int]:
    """Run jobs ``(set, steps)``, one more every ``apart`` turns: the set of each turn, and the longest wait."""
    scheduler = Scheduler(max_batch, patience)
    turns, last, longest, waiting = [], {}, 0, dict(enumerate(jobs))
    while waiting or len(scheduler):
        while waiting and (apart * min(waiting) <= len(turns) or not len(scheduler)):
            row_id = min(waiting)
            scheduler.add(row_id, *waiting.pop(row_id))
            last[row_id] = len(turns)
        chosen = scheduler.next_rows()
        turns.append(jobs[chosen[0]][0])
        for row_id in chosen:
            longest = max(longest, len(turns) - last[row_id])
            last[row_id] = len(turns)
    return turns, longest


@given(rows, st.integers(1, 4), seconds, seconds)
def test_nobody_waits_longer_than_the_most(jobs, max_batch, switch, step):
    """The scheduler's bound, with the patience that the costs ask for."""
    patience = learnt(switch, step).patience(len({loras for loras, _ in jobs}))
    _, longest = run(jobs, max_batch, patience)
    assert longest <= patience + len(jobs) <= MOST_PATIENCE + len(jobs)


@pytest.mark.parametrize(("switch", "sets"), [(0.2, "abcd"), (0.4, "abcd"), (1.0, "abcd"), (0.4, "abcdefgh")])
def test_switching_keeps_to_its_share(switch, sets):
    """Forty jobs of many sets, more arriving than can be served at once: a tenth of the time, give or take a fifth."""
    random.seed(1)
    jobs = [(random.choice(sets), random.choice((8, 30, 30, 50))) for _ in range(40)]

    def share(patience):
        turns, _ = run(jobs, 4, patience, apart=8)
        spent = switch * sum(a != b for a, b in itertools.pairwise(turns))
        return spent / (spent + len(turns))

    assert share(learnt(switch, 1).patience(len(sets))) <= 1.2 * MOST_SHARE
    if switch >= 0.4:
        assert share(PATIENCE) > 1.5 * MOST_SHARE  # without it
