"""Strange bytes: the corpus and a few thousand changes of it, in a process of its own whose memory is watched.

``make fuzz`` does the same for minutes, guided by coverage; what it finds is added to the corpus.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.fuzz_targets import CORPUS, TARGETS, Target, inputs

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2


def fuzz(*options: str) -> tuple[int, str, int]:
    """Run the fuzzer; return its exit status, what it said, and its peak memory in MB."""
    command = [sys.executable, "-m", "tests.security.fuzz", *options]
    read, write = os.pipe()
    child = subprocess.Popen(command, cwd=ROOT, stdout=write, stderr=write, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(write)
    with os.fdopen(read) as output:
        said = output.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, said, usage.ru_maxrss // 1024


@pytest.mark.parametrize("name", TARGETS)
def test_strange_bytes_are_read_or_refused_in_bounded_memory(name):
    """Nothing but our own errors comes out, nothing takes for ever, and memory stays under the target's cap."""
    status, said, _ = fuzz(name, "--inside", "--plain", "--seconds", str(SECONDS))
    assert status == 0, said
    assert f"{name}: " in said and "inputs" in said


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_a_corpus(name):
    """The seeds are there, and the files on disk are small."""
    assert len(list(inputs(name))) >= 5
    assert all(file.stat().st_size <= 65536 for file in (CORPUS / name).glob("*"))


@pytest.mark.parametrize(
    ("run", "phrase"),
    [
        (lambda data: 1 / len(data[:0]), "ZeroDivisionError"),
        (lambda data: len(HELD) < 30 and HELD.append(bytearray(b"x" * 10_000_000)), "memory grew"),
    ],
)
def test_the_fuzzer_sees_a_crash_and_a_flood(monkeypatch, tmp_path, run, phrase):
    """The control: a reader that raises, and one that eats memory, do not pass."""
    from tests.security import fuzz as fuzzing

    high = b"x" * 1_000_000_000  # what a test before this one may have needed: it must not hide the flood
    del high
    monkeypatch.setattr(fuzzing, "CORPUS", tmp_path)
    monkeypatch.setitem(fuzzing.TARGETS, "bad", Target(run, lambda: iter([b"a", b"b"]), 20, ()))
    with pytest.raises((ZeroDivisionError, AssertionError)) as seen:
        fuzzing.plainly("bad", 2)
    HELD.clear()
    assert phrase in f"{seen.typename} {seen.value}"


HELD: list[bytearray] = []
