"""The gate: what passes, what is given in place of a flagged picture, and that it fails closed."""

import math
import threading
import time

import numpy as np
import pytest

from impasto.errors import CheckFailed, ContentRefused, InvalidInput
from impasto.safety.checker import Combined, Verdict
from impasto.safety.denylist import DenyList
from impasto.safety.gate import SafetyGate
from tests import harmless

PHOTO = harmless.pictures()["portrait"]


class Scripted:
    """Gives the scores it was told to, one a picture, and remembers the pictures."""

    version = "1"

    def __init__(self, *scores, name="scripted", threshold=0.5):
        self.name, self.scores, self.seen, self.threshold = name, list(scores), [], threshold

    def check(self, images):
        self.seen += images
        scores = [self.scores.pop(0) for _ in images]
        return [Verdict(score >= self.threshold, score, self.name, {"nsfw": score}) for score in scores]


class Broken:
    """Does not check, in the way it was told."""

    name, version = "broken", "1"

    def __init__(self, check):
        self.check = check


def test_a_harmless_picture_passes_as_it_is():
    """The very same picture, not a copy."""
    checker = Scripted(0.49)
    assert SafetyGate(checker).passed(PHOTO, True) == (PHOTO, False)
    assert len(checker.seen) == 1


@pytest.mark.parametrize("size", [(512, 512), (1024, 576), (8, 200)])
def test_a_flagged_picture_becomes_black(size):
    """Of the same size, RGB, and every value 0."""
    given, flagged = SafetyGate(Scripted(0.5)).passed(PHOTO.resize(size), True)
    assert (flagged, given.size, given.mode) == (True, size, "RGB")
    assert not np.asarray(given).any()


def test_a_flagged_picture_becomes_a_blur():
    """Of the same size, and so smooth that 64 numbers for each colour say all of it."""
    given, flagged = SafetyGate(Scripted(0.9), action="blur").passed(PHOTO, True)
    assert (flagged, given.size) == (True, PHOTO.size)
    assert given.getbbox() is not None
    seen = np.asarray(given, dtype=float)
    before = np.asarray(PHOTO, dtype=float)
    assert np.abs(np.diff(seen, axis=1)).max() < 16 < np.abs(np.diff(before, axis=1)).max()


def test_a_flagged_picture_may_end_the_prediction():
    """With words that say what to do and no score."""
    with pytest.raises(ContentRefused, match="another seed") as caught:
        SafetyGate(Scripted(0.987), action="error").passed(PHOTO, True)
    assert "987" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "allowed", "checked"),
    [(True, True, True), (True, False, True), (False, True, False), (False, False, True)],
)
def test_a_request_may_do_without_unless_the_operator_forbids_it(wanted, allowed, checked):
    """The four cases, for pictures and for previews."""
    gate = SafetyGate(Scripted(1.0), allow_disable=allowed, previews=False)
    assert gate.passed(PHOTO, wanted)[1] is checked
    assert gate.shows_previews(wanted) is not checked
    assert SafetyGate(Scripted(1.0), allow_disable=allowed).shows_previews(wanted), "unless the operator says so"


def test_without_a_checker_everything_passes():
    """The operator's own choice, ``none``; then previews are shown, too."""
    gate = SafetyGate(None, allow_disable=False, check_inputs=True, previews=False)
    assert gate.passed(PHOTO, True) == (PHOTO, False)
    assert gate.shows_previews(True)
    gate.admit("a fox", PHOTO, True)


def failing(_images):
    raise RuntimeError("secret /path")


@pytest.mark.parametrize(
    "check",
    [
        failing,
        lambda images: [],
        lambda images: [Verdict(False, 0.0, "x")] * 2,
        lambda images: None,
        lambda images: [Verdict(False, math.nan, "x")],
    ],
    ids=["raises", "no verdict", "two verdicts", "nothing", "no number"],
)
def test_a_checker_that_does_not_work_passes_nothing(check, caplog):
    """Whatever it does instead of giving one verdict; the reason is in the log and not in the message."""
    with pytest.raises(CheckFailed) as caught:
        SafetyGate(Broken(check)).passed(PHOTO, True)
    assert "secret" not in str(caught.value)
    assert "broken failed" in caplog.text
    assert ("secret /path" in caplog.text) is (check is failing)


def test_a_checker_that_hangs_passes_nothing():
    """The picture is refused when the time is up; a checker that works again is heard again."""
    release = threading.Event()
    checker = Scripted(0.1)

    def hanging(images):
        release.wait(20)
        return checker.check(images)

    gate = SafetyGate(Broken(hanging), seconds=0.1)
    start = time.monotonic()
    with pytest.raises(CheckFailed):
        gate.passed(PHOTO, True)
    assert time.monotonic() - start < 5
    release.set()
    time.sleep(0.2)
    checker.scores.append(0.1)
    assert gate.passed(PHOTO, True) == (PHOTO, False)


def test_start_pictures_are_checked_where_the_operator_says_so():
    """Transparent ones, too, which are given to the checker as RGB."""
    start = PHOTO.convert("RGBA")
    SafetyGate(Scripted(1.0)).admit("a fox", start, True)
    checker = Scripted(0.1, 0.9)
    gate = SafetyGate(checker, check_inputs=True)
    gate.admit("a fox", start, True)
    with pytest.raises(ContentRefused, match="image was flagged"):
        gate.admit("a fox", start, True)
    assert {image.mode for image in checker.seen} == {"RGB"}
    gate.admit("a fox", None, True)
    gate.admit("a fox", start, False)
    with pytest.raises(IndexError):  # positive control: the script is at its end, so none of the last two was checked
        checker.check([PHOTO])


def test_prompts_are_held_against_the_deny_list():
    """Whether the checker is on or not."""
    gate = SafetyGate(denylist=DenyList(["red fox"]))
    gate.admit("a fox", None, True)
    with pytest.raises(InvalidInput, match="prompt has 'red fox'"):
        gate.admit("A Red Fox!", None, False)


def test_one_of_several_checkers_is_enough_to_flag():
    """The verdict that counts is the one that flags, even if another has the higher score."""
    low = Scripted(0.2, 0.2, 0.4, name="low", threshold=0.3)
    high = Scripted(0.1, 0.7, 0.1, name="high", threshold=0.6)
    combined = Combined([low, high])
    verdicts = combined.check([PHOTO] * 3)
    assert [(v.flagged, v.checker) for v in verdicts] == [(False, "low"), (True, "high"), (True, "low")]
    assert (combined.name, combined.version) == ("low,high", "1,1")


def test_several_checkers_must_all_answer():
    """One that leaves out a picture is an error, not a pass for it."""
    with pytest.raises(ValueError, match="zip"):
        Combined([Scripted(0.1, 0.1), Broken(lambda _: [Verdict(False, 0.0, "x")])]).check([PHOTO] * 2)
