"""``make fuzz``: bytes that grow ever stranger, for so many seconds a target, each target in a process of its own.

Knows a plain mutator that needs nothing, and starts ``fuzz_guided`` in its place where atheris is installed. A
finding's bytes are left in ``corpus/<target>/``, from where ``test_fuzz.py`` plays them back for ever after.

    python -m tests.security.fuzz [TARGET …] [--seconds 300] [--plain]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.security.fuzz_targets import CORPUS, TARGETS, inputs

MAX_LENGTH = 65536  # bytes of an input that is made
HANG_SECONDS = 20


def forget_peak() -> None:
    """Let ``peak`` begin anew, whatever this process held before (proc(5), ``clear_refs``)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most memory that this process had at a time since its start or ``forget_peak``, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def mutated(data: bytes, rng: random.Random, others: list[bytes], words: tuple[str, ...]) -> bytes:
    """Change a few places of ``data``."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(result) + 1)
        span = rng.randint(1, 8)
        match rng.randrange(7):
            case 0:
                result[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del result[at : at + span]
            case 2 if words:
                result[at:at] = rng.choice(words).encode()
            case 3:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                result[at : at + span] = other[start : start + rng.randint(1, 64)]
            case 4:
                result[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
            case 5:
                result[at:at] = rng.choice((b"9" * 20, b"[", b"{", b'"', b"-", b"\\u0000", b"e99"))
            case _:
                result[at : at + span] = result[at : at + span] * rng.randint(2, 20)
    return bytes(result[:MAX_LENGTH])


def plainly(name: str, seconds: float, seed: int = 0) -> int:
    """Run a target on its inputs and on changes of them; return how many there were. Raises what the target raises."""
    target, rng = TARGETS[name], random.Random(seed)
    known = list(inputs(name))
    for data in known:
        _watched(name, data)
    forget_peak()
    before, ends, count = peak(), time.monotonic() + seconds, len(known)
    while time.monotonic() < ends:
        _watched(name, mutated(rng.choice(known), rng, known, target.words))
        count += 1
    grown = peak() - before
    print(f"{name}: {count} inputs, {grown} MB more than after the seeds (cap {target.cap})", flush=True)
    assert grown <= target.cap, f"{name}: memory grew by {grown} MB"
    return count


def _watched(name: str, data: bytes) -> None:
    started = time.monotonic()
    try:
        TARGETS[name].run(data)
    except Exception:
        print(f"finding: {_kept(name, data)}", flush=True)
        raise
    if time.monotonic() - started > HANG_SECONDS:
        raise AssertionError(f"{name} takes {time.monotonic() - started:.0f} s on {_kept(name, data)}")


def _kept(name: str, data: bytes) -> Path:
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"found-{hashlib.sha256(data).hexdigest()[:16]}"
    file.write_bytes(data)
    return file


def has_atheris() -> bool:
    """Whether the guided fuzzer is installed."""
    return importlib.util.find_spec("atheris") is not None


def main() -> int:
    """Run each target in a process of its own; return how many found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        plainly(*asked.targets, asked.seconds)
        return 0
    failed = 0
    for name in asked.targets or TARGETS:
        command = [sys.executable, "-m", "tests.security.fuzz_guided", name, str(asked.seconds)]
        if asked.plain or not has_atheris():
            command = [sys.executable, "-m", "tests.security.fuzz", name, "--inside", "--seconds", str(asked.seconds)]
        child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        print(f"== {name}: exit {child.returncode}, peak {usage.ru_maxrss // 1024} MB", flush=True)
        failed += child.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
