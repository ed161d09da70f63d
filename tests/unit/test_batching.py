"""How many images share a call follows what calls were measured to take."""

from __future__ import annotations

from collections import Counter

import pytest

from impasto.engine.batching import EXPLORE, MEASURED, RENEW, BatchTimes

ROUNDS = 400


def choices(cost: dict[int, float], rounds: int = ROUNDS, ready: int = 4) -> list[int]:
    """What is chosen, round by round, on a machine where calls of so many images take so long."""
    times, made = BatchTimes(), []
    for _ in range(rounds):
        made.append(times.choose("512", ready))
        times.learn("512", made[-1], cost[made[-1]])
    return made


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),  # a processor that is full with one image
        ({1: 1.0, 2: 1.95, 4: 3.8}, 1),  # sharing gains 5 %: not worth keeping the shorter job
        ({1: 1.0, 2: 1.0, 4: 1.1}, 4),  # a device that one image leaves idle
        ({1: 1.0, 2: 1.2, 4: 2.3}, 2),
        ({1: 1.0, 2: 3.0, 4: 2.5}, 4),
    ],
)
def test_the_fewest_images_near_the_best_rate_share_a_call(cost: dict[int, float], best: int) -> None:
    """All but the rounds that explore choose it, once every number is known."""
    settled = choices(cost)[3 * MEASURED * EXPLORE :]
    assert Counter(settled)[best] >= len(settled) - 2 * len(settled) // RENEW - 1


def test_all_go_together_until_fewer_are_known() -> None:
    assert choices({1: 1.0, 2: 2.0, 4: 4.0}, EXPLORE - 1) == [4] * (EXPLORE - 1)


def test_a_number_of_images_that_was_never_there_is_tried_whole() -> None:
    times = BatchTimes()
    for _ in range(MEASURED):
        times.learn("512", 1, 1.0)
    assert times.choose("512", 3) == 3


def test_it_follows_a_machine_that_changes() -> None:
    times, made = BatchTimes(), []
    for number in range(3000):
        made.append(times.choose("512", 2))
        times.learn("512", made[-1], 1.0 if number > 500 and made[-1] == 2 else float(made[-1]))
    assert Counter(made[300:500]).most_common(1)[0][0] == 1
    assert Counter(made[-500:]).most_common(1)[0][0] == 2


def test_sizes_are_told_apart() -> None:
    times = BatchTimes()
    for size, cost in (("small", 1.0), ("large", 4.0)):
        for _ in range(MEASURED):
            times.learn(size, 1, 1.0)
            times.learn(size, 2, 1.05 if size == "small" else 2.0)
            times.learn(size, 4, 1.1 if size == "small" else cost)
    assert (times.choose("small", 4), times.choose("large", 4)) == (4, 1)


@pytest.mark.parametrize("ready", range(1, 9))
def test_never_more_than_are_ready_and_never_none(ready: int) -> None:
    made = choices(dict.fromkeys(range(1, 9), 0.0), rounds=200, ready=ready)
    assert all(1 <= count <= ready for count in made)
