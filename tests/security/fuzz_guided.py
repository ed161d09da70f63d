"""One target of ``make fuzz`` under atheris, which sees where bytes lead and keeps those that lead to new places.

Knows that only what is imported after atheris is watched: so the targets, the package and Pillow's readers are imported
here, and ``fuzz`` starts this module in a process of its own.

    python -m tests.security.fuzz_guided TARGET SECONDS
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["impasto", "PIL", "tests.security.fuzz_targets"]):
    from impasto.api import pictures, submission  # noqa: F401
    from impasto.lora import formats, gate  # noqa: F401
    from tests.security.fuzz_targets import CORPUS, TARGETS, inputs

MAX_LENGTH = 65536  # bytes of an input that is made
HANG_SECONDS = 20
TABLES = 100  # MB for the fuzzer's own


def main(name: str, seconds: float) -> None:
    """Run a target until the time is over or something is found; the process ends with it."""
    target = TARGETS[name]
    fresh, dictionary = Path(tempfile.mkdtemp()), Path(tempfile.mkstemp()[1])
    for index, data in enumerate(inputs(name)):
        (fresh / f"seed{index:03}").write_bytes(data)
        target.run(data)
    dictionary.write_text("".join(f'"{word}"\n' for word in target.words))
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    options = [
        f"-max_total_time={seconds:g}", f"-max_len={MAX_LENGTH}", f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={held + target.cap + TABLES}", f"-artifact_prefix={CORPUS / name}/found-",
        f"-dict={dictionary}", "-verbosity=1", "-print_final_stats=1",
    ]  # fmt: skip
    print(f"{name}: {held} MB after the seeds", flush=True)
    atheris.Setup([sys.argv[0], *options, str(fresh)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
