"""What calls and switches were measured to take decides who shares a call and who waits."""

from __future__ import annotations

import pytest

from impasto.engine.batching import MEASURED
from impasto.engine.costs import Costs
from impasto.engine.mixing import MOST_PATIENCE, PATIENCE_SECONDS
from impasto.engine.scheduler import PATIENCE, Scheduler

SETS = 20


def learnt(step: float, calls: int = MEASURED) -> Costs:
    """Costs of a machine whose calls of one image take so long."""
    costs = Costs()
    for _ in range(calls):
        costs.learn("512", 1, step, None)
    return costs


@pytest.mark.parametrize(("step", "turns"), [(0.1, 40), (1.0, PATIENCE), (60.0, PATIENCE), (1e-4, MOST_PATIENCE)])
def test_short_steps_are_waited_for_in_seconds(step: float, turns: int) -> None:
    """A few seconds at any rate, eight turns at least, and no more than the most."""
    assert learnt(step).patience(1) == turns == max(PATIENCE, min(MOST_PATIENCE, round(PATIENCE_SECONDS / step)))


def test_what_a_switch_costs_the_next_call_is_the_switchs() -> None:
    """Weights that are packed anew: the switch alone takes a hundredth of a step, with them half of one."""
    cheap, dear = learnt(1.0), learnt(1.0)
    for _ in range(MEASURED):
        cheap.learn("512", 1, 1.0, 0.01)
        dear.learn("512", 1, 1.49, 0.01)
    assert cheap.patience(SETS) == SETS
    assert dear.patience(SETS) == 5 * SETS  # half a step of switching in five: a tenth of the time


def test_calls_after_a_switch_do_not_make_steps_look_slow() -> None:
    """Once the usual time is known, that is; before, they are all there is."""
    costs = learnt(1.0)
    for _ in range(50):
        costs.learn("512", 1, 3.0, 0.1)
    assert costs._calls.usual("512", 1) == 1.0
    fresh = Costs()
    for _ in range(MEASURED):
        fresh.learn("512", 1, 3.0, 0.1)
    assert fresh._calls.usual("512", 1) == 3.0


def test_a_few_large_steps_are_longer_than_many_small_ones() -> None:
    """Twelve steps of a quarter of the pixels go before four of all of them."""
    scheduler = Scheduler(max_batch=1)
    scheduler.add(0, "1024", 4, weight=4.0)
    scheduler.add(1, "512", 12, weight=1.0)
    assert [scheduler.next_rows()[0] for _ in range(8)] == [1] * 8
