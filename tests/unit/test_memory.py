"""Batch limits follow measured memory: property tests of the arithmetic, and the real probe where Linux has one."""

import ctypes
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from impasto.engine.memory import PROC, BatchLimits, MemoryGauge, free_memory, process_memory

CPU = torch.device("cpu")
MIB = 2**20
sizes = st.integers(0, 10**12)
counts = st.integers(1, 64)


class Known:
    """A gauge that reads what it is told."""

    def __init__(self, free):
        self.bytes = free

    def free(self):
        return self.bytes


@given(sizes, counts)
def test_an_unknown_kind_of_call_starts_with_one_row(free, most):
    """Nothing is guessed, however much is free; and what is learnt of one kind says nothing of another."""
    limits = BatchLimits(Known(free), most)
    limits.learn("other", 1, 1)
    assert limits.limit("base 64x64") == 1


@given(sizes, counts, counts, st.integers(1, 10**11))
def test_the_limit_is_nine_tenths_of_the_free_memory(free, most, rows, peak):
    """floor(0.9 * free / bytes a row), at least 1, at most ``most``."""
    limits = BatchLimits(Known(free), most)
    limits.learn("k", rows, peak)
    assert limits.limit("k") == max(1, min(most, math.floor(0.9 * free / (peak / rows))))


@given(sizes, sizes, st.integers(1, 10**10), counts)
def test_more_free_memory_never_means_fewer_rows(one, other, peak, rows):
    """The limit is read anew each time, and grows with what is free."""
    gauge = Known(min(one, other))
    limits = BatchLimits(gauge, 64)
    limits.learn("k", rows, peak)
    tight = limits.limit("k")
    gauge.bytes = max(one, other)
    assert limits.limit("k") >= tight


calls = st.lists(st.tuples(counts, st.none() | st.integers(0, 10**10)), max_size=12)


@given(sizes | st.none(), counts, calls, st.lists(st.none() | counts, max_size=8))
def test_the_limit_is_always_from_one_to_most(free, most, learnt, halved):
    """Whatever is measured, not measured, or run out of."""
    limits = BatchLimits(Known(free), most)
    for rows, peak in learnt:
        limits.learn("k", rows, peak)
        assert 1 <= limits.limit("k") <= most
    for rows in halved:
        before = limits.limit("k")
        limits.halve("k", rows)
        assert 1 <= limits.limit("k") <= max(1, min(before, rows or before) // 2)


@given(st.lists(st.tuples(counts, st.integers(1, 10**10)), min_size=1, max_size=12))
def test_the_largest_call_counts_and_of_equals_the_hungriest(learnt):
    """Small calls carry fixed costs that a row of a large one does not."""
    limits = BatchLimits(Known(10**12), 10**9)
    for rows, peak in learnt:
        limits.learn("k", rows, peak)
    most_rows = max(rows for rows, _ in learnt)
    per_row = max(peak / rows for rows, peak in learnt if rows == most_rows)
    assert limits.limit("k") == max(1, min(10**9, math.floor(0.9 * 10**12 / per_row)))


def test_running_out_of_memory_halves_the_limit_for_good():
    """What is measured later does not lift it; one kind of call only."""
    limits = BatchLimits(Known(1000), 16)
    for key in ("a", "b"):
        limits.learn(key, 1, 10)
        assert limits.limit(key) == 16
    limits.halve("a")
    assert limits.limit("a") == 8
    limits.halve("a", rows=4)  # the call that failed had fewer rows than it might have had
    limits.learn("a", 2, 2)
    assert limits.limit("a") == 2
    for _ in range(3):
        limits.halve("a")
    assert limits.limit("a") == 1 and limits.limit("b") == 16


def test_where_memory_cannot_be_measured_the_setting_alone_holds():
    """``None`` for the peak, or for what is free: as many rows as ``most``, until memory runs out."""
    limits = BatchLimits(Known(None), 6)
    limits.learn("k", 1, 100)
    assert limits.limit("k") == 6
    limits = BatchLimits(Known(10), 6)
    limits.learn("k", 1, None)
    assert limits.limit("k") == 6
    limits.learn("k", 1, 5)
    assert limits.limit("k") == 1


@pytest.mark.parametrize("wrong", [(0, 1), (-1, 1), (1, -1)])
def test_impossible_measurements_are_refused(wrong):
    """A caller's mistake shows at once."""
    with pytest.raises(ValueError, match="cannot be"):
        BatchLimits(Known(1), 1).learn("k", *wrong)
    with pytest.raises(ValueError, match="at least 1"):
        BatchLimits(Known(1), 0)


def clearable() -> bool:
    """Whether this system lets a process reset its high-water mark."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return process_memory("VmHWM") is not None


@pytest.fixture
def fresh() -> None:
    """What earlier tests freed is with the system again: a block that is used anew is no new memory."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


needs_linux = pytest.mark.skipif(not clearable(), reason="/proc/self/clear_refs cannot be written here")


@needs_linux
@pytest.mark.usefixtures("fresh")
def test_the_gauge_sees_what_a_call_took_and_gave_back():
    """256 MiB held for a moment are seen, to an eighth, though nothing of them is left; an idle block takes nothing."""
    gauge = MemoryGauge(CPU)
    with gauge.measure() as peak:
        torch.ones(256 * MIB // 4)
    assert peak.bytes == pytest.approx(256 * MIB, rel=0.125)
    with gauge.measure() as idle:
        pass
    assert idle.bytes is not None and idle.bytes < 8 * MIB


@needs_linux
@pytest.mark.usefixtures("fresh")
def test_what_was_held_before_does_not_count():
    """The peak is above the start, not above zero."""
    held = torch.ones(128 * MIB // 4)
    with MemoryGauge(CPU).measure() as peak:
        torch.ones(64 * MIB // 4)
    assert held.sum() > 0
    assert peak.bytes == pytest.approx(64 * MIB, rel=0.25)


@needs_linux
def test_free_memory_falls_by_what_is_taken():
    """The real figure follows the real machine; others work on it at the same time, so coarsely."""
    before = MemoryGauge(CPU).free()
    held = torch.ones(1024 * MIB // 4)
    after = MemoryGauge(CPU).free()
    assert held.numel() and before is not None and after is not None
    assert before - after > 256 * MIB


def test_a_system_without_such_files_is_not_measured(monkeypatch, tmp_path):
    """No /proc, no answer, and no error."""
    monkeypatch.setattr("impasto.engine.memory.PROC", tmp_path / "none")
    with MemoryGauge(CPU).measure() as peak:
        pass
    assert peak.bytes is None
    assert free_memory(tmp_path / "none", tmp_path) is None
    assert MemoryGauge(torch.device("meta")).free() is None


def system(root: Path, group_line: str, available: int = 8000, **files: str) -> tuple[Path, Path]:
    """A /proc with ``available`` KiB, and control groups as given (``__`` in a name stands for a folder)."""
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 16000 kB\nMemAvailable:    {available} kB\n")
    (proc / "self/cgroup").write_text(group_line)
    for name, text in files.items():
        file = cgroups / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return proc, cgroups


def group(folder: str, limit: str, usage: int, reclaimable: int = 0, version: int = 2) -> dict[str, str]:
    """The files of one control group."""
    names = ("memory_dot_max", "memory_dot_current", "inactive_file")
    if version == 1:
        names = ("memory_dot_limit_in_bytes", "memory_dot_usage_in_bytes", "total_inactive_file")
    return {
        f"{folder}{names[0]}": f"{limit}\n",
        f"{folder}{names[1]}": f"{usage}\n",
        f"{folder}memory_dot_stat": f"anon 5\n{names[2]} {reclaimable}\n",
    }


def test_without_a_control_group_the_machine_counts(tmp_path):
    """MemAvailable, in bytes."""
    assert free_memory(*system(tmp_path, "")) == 8000 * 1024


def test_a_container_limit_bounds_what_is_free(tmp_path):
    """Version 2: limit less usage, with the file pages that can be dropped."""
    files = group("box__", "1000000", 700_000, 50_000)
    assert free_memory(*system(tmp_path, "0::/box\n", **files)) == 350_000


def test_the_limit_of_an_outer_group_counts_too(tmp_path):
    """A group without a limit of its own stands under its parents'."""
    files = group("pod__box__", "max", 5) | group("pod__", "300000", 100_000)
    assert free_memory(*system(tmp_path, "0::/pod/box\n", **files)) == 200_000


def test_an_old_style_group_is_read_too(tmp_path):
    """Version 1, where the path may not exist inside the container and its root is the container's own group."""
    files = group("memory__", "500000", 100_000, version=1)
    line = "7:cpu:/x\n4:rdma,memory:/docker/0123\n0::/\n"
    assert free_memory(*system(tmp_path, line, **files)) == 400_000


def test_a_machine_with_less_than_the_limit_counts_itself(tmp_path):
    """A limit of more than there is limits nothing; a group that is over its limit leaves nothing."""
    files = group("", "9223372036854771712", 10)
    assert free_memory(*system(tmp_path / "a", "0::/\n", available=3, **files)) == 3 * 1024
    assert free_memory(*system(tmp_path / "b", "0::/\n", **group("", "10", 20))) == 0
