"""What a prompt's padding is taught to tell, and a training of several processes that is asked to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.test_training_second import known  # noqa: F401
from training import architecture
from training.second import cells, plans
from training.second.art import LEVELS, Art
from training.second.course import TINY
from training.second.scene import draw, usual
from training.second.subjects import STYLES, subjects

WORK = """
import sys
import time
from pathlib import Path
from training.team import asked_to_stop, together

def work(team, folder):
    (Path(folder) / f"here {team.rank}").touch()
    while not team.any(asked_to_stop()):
        time.sleep(0.01)
    (Path(folder) / f"ended {team.rank}").touch()

if __name__ == "__main__":
    together(2, work, sys.argv[1])
"""


def corner() -> Art:
    """Drawings that are all clear but one, the first subject's flat one: it is red in its upper right quarter."""
    count = len(subjects()) * len(STYLES)
    small = torch.zeros(count, 4, 96, 96, dtype=torch.uint8)
    small[1, 0, :48, 48:] = small[1, 3, :48, 48:] = 255
    return Art(dict.fromkeys(LEVELS, small))


def test_squares_lie_where_they_are_in_the_drawing() -> None:
    """A red quarter is four squares of sixteen, row by row; all others are alike, and no subject is nothing."""
    table = cells.drawn(corner())["cells"]
    assert table.shape == (len(subjects()) + 1, len(STYLES), cells.GRID**2, cells.PARTS)
    assert table[-1].abs().max() == 0
    clear = table[1, 0, 0]
    different = [(square - clear).abs().max() > 0.1 for square in table[0, 1]]
    assert [at for at, is_red in enumerate(different) if is_red] == [2, 3, 6, 7]
    assert torch.allclose(table[0, 0], clear.expand_as(table[0, 0]), atol=1e-5)


def test_states_that_tell_the_squares_are_right_and_others_are_not() -> None:
    """The error is nothing for both things' squares in their places, and something with the things exchanged."""
    kinds = len(subjects()) + 1, len(STYLES)
    told = cells.Told(torch.randn(*kinds, cells.GRID**2, cells.PARTS), torch.randn(*kinds, cells.LOOKS))
    meant, exchanged = torch.tensor([[3, 8, *cells.UNSAID[2:]]]), torch.tensor([[8, 3, *cells.UNSAID[2:]]])
    whole, pooled = told.whole(meant, 0.0, seed=1), told.pooled(meant)
    assert whole.shape == (1, architecture.PROMPT_TOKENS, sum(architecture.WIDER))
    assert [float(part) for part in cells.error(told, whole, pooled, meant)] == [0, 0]
    assert all(float(part) > 0.1 for part in cells.error(told, whole, pooled, exchanged))
    worn = told.whole(meant, 1.0, seed=1) - whole
    assert (worn[0].abs().amax(0) > 0).sum() == cells.PARTS and worn[0, : cells.FIRST].abs().max() == 0


def test_things_are_drawn_near_where_text_says_they_usually_are() -> None:
    """For every word of place, size and relation, and in a scenery; the squares lie around the thing's middle."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(600):
        made = draw(rng, 256, 256, 8, plain=0.5, pairs=0.4)
        seen.add((made.said, made.ground.plain))
        shown = made.things[:: 2 if made.said == "three" else 1]
        for thing, other in zip(shown, usual(made.said, not made.ground.plain), strict=False):
            apart = max(abs(thing.x - other.x), abs(thing.y - other.y), abs(thing.size - other.size))
            assert apart < 0.12, (made.said, thing, other)
    assert {said for said, _ in seen} == set(cells.SAID)
    squares = cells.squares_on_pictures()[0, cells.SAID.index("top left")]
    assert squares[: cells.GRID**2, :2].mean(0).tolist() == pytest.approx([0.26, 0.26])
    assert (squares[1] - squares[0])[:2].tolist() == pytest.approx([0.42 / cells.GRID, 0], abs=1e-6)


@pytest.mark.usefixtures("known")
def test_a_plan_says_what_its_texts_tell_of() -> None:
    """The scene's things and style; of an empty text, nothing."""
    steps = [plans.Plans(TINY, 0)[step] for step in range(24)]
    told = torch.cat([plan.meant for plan in steps])
    empty = torch.cat([(plan.ids[:, 1] == plan.ids[:, -1]) for plan in steps])
    assert empty.any() and not empty.all()
    assert (told[empty][:, :2] == cells.NOTHING).all()
    assert (told[~empty][:, 0] < TINY.cast).any() and (told[:, 2] < len(STYLES)).all()


def test_a_team_asked_to_end_ends_as_a_whole(tmp_path: Path) -> None:
    """A signal to the process that was started reaches the ones that work, which leave in their own time."""
    script = tmp_path / "worked.py"
    script.write_text(WORK)
    root = Path(__file__).parents[2]
    started = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=os.environ | {"PYTHONPATH": str(root)})
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("here *"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    finally:
        started.kill()
    assert len(list(tmp_path.glob("ended *"))) == 2
