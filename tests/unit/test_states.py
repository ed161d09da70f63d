"""What the states of a job promise."""

from __future__ import annotations

import pytest

from impasto.errors import IllegalMove
from impasto.jobs.states import NEXT, TERMINAL, Status, check_move

LEGAL = [
    ("created", "processing"),
    ("created", "cancelled"),
    ("processing", "created"),
    ("processing", "completed"),
    ("processing", "failed"),
    ("processing", "cancelled"),
]
EVERY = [(here, there) for here in Status for there in Status]


@pytest.mark.parametrize(("here", "there"), LEGAL)
def test_a_job_may_go_where_its_life_leads(here, there):
    """Waiting, held, waiting again after a loss, ended."""
    check_move(Status(here), Status(there))


@pytest.mark.parametrize(("here", "there"), [move for move in EVERY if move not in LEGAL])
def test_every_other_move_is_refused_with_both_states_named(here, there):
    """A move that nobody planned is a mistake in our code, and says so."""
    with pytest.raises(IllegalMove, match=f"from {here} to {there}"):
        check_move(here, there)


def test_every_state_says_where_it_leads():
    """No state is forgotten in the table of moves."""
    assert set(NEXT) == set(Status)


def test_nothing_leaves_a_terminal_state():
    """Ended is ended."""
    assert {status for status in Status if not NEXT[status]} == TERMINAL


def test_every_state_can_be_reached_and_left_or_is_terminal():
    """From ``created`` every other state can be reached: none is dead."""
    reached, frontier = set(), {Status.CREATED}
    while frontier:
        reached |= frontier
        frontier = {there for here in frontier for there in NEXT[here]} - reached
    assert reached == set(Status)


def test_a_state_is_the_text_that_the_database_holds():
    """So rows read well in any database client."""
    assert [str(status) for status in Status] == ["created", "processing", "completed", "failed", "cancelled"]
