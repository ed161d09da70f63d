"""What is loaded when: the server half starts without torch."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers")
CODE = """
import sys
{statement}
print(*(name for name in {heavy!r} if name in sys.modules))
"""


def loaded_by(statement: str) -> list[str]:
    code = CODE.format(statement=statement, heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import impasto; impasto.GenerationRequest(prompt='a fox')",
        "import impasto.cli",
        "import impasto.serving",
        "import impasto.api.app",
        "import impasto.jobs.store",
        "import impasto.worker.loop, impasto.worker.supervisor",
        "import impasto.engine.scheduler",
    ],
)
def test_the_server_half_loads_no_torch(statement):
    """The API, the store, the worker's loop and ``import impasto`` itself do without the gigabyte."""
    assert loaded_by(statement) == []


def test_the_measurement_sees_torch():
    """Positive control: the engine does load it."""
    assert "torch" in loaded_by("import impasto; impasto.Engine")
