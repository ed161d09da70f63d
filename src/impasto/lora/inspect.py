"""What a LoRA file is and whether it applies to a model, found out without the model's weights.

Knows the gate, the reader and the report. Knows no models beyond the names and shapes it is given, and no terminal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from impasto.errors import LoraError
from impasto.lora.base_model import base_model, describe
from impasto.lora.formats import read_lora
from impasto.lora.gate import check_header
from impasto.lora.keys import Parameter, Target, TargetNames
from impasto.lora.notes import trigger_words
from impasto.lora.report import LoraReport

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # network -> parameter, such as ``conv_in.weight`` -> shape


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Attributes:
        what: Such as ``an SDXL LoRA``.
        problem: Why it does not apply to the model, in one sentence; ``None``: it does.
        report: What it holds; of a file that does not apply, what its header tells.
    """

    what: str
    problem: str | None
    report: LoraReport

    def to_json(self) -> dict[str, Any]:
        """Return the report's values, with ``what``, ``applies`` and ``problem`` before them."""
        verdict = {"what": self.what, "applies": self.problem is None, "problem": self.problem}
        return verdict | {key: value for key, value in self.report.to_json().items() if key != "scale"}


def inspect_lora(path: Path, name: str, shapes: Shapes) -> Inspection:
    """Say what a file is, and what it would do to a model.

    Args:
        path: The file.
        name: What the user called it.
        shapes: The model's parameters, as ``models.shapes.parameter_shapes`` gives them.

    Raises:
        LoraError: It is not a safetensors file, or one that no trainer writes; nothing of it is read then.
    """
    header = check_header(path, name)
    what = describe(header)
    try:
        contents = read_lora(path, TargetNames(_targets(shapes)), name)
    except LoraError as error:
        report = LoraReport(
            name, base_model=base_model(header), trigger_words=trigger_words(header.metadata), sha256=_sha256(path)
        )
        return Inspection(what, error.problem, report)
    return Inspection(what, None, LoraReport.of(contents, name))


def _targets(shapes: Shapes) -> dict[Target, tuple[int, ...]]:
    targets = {}
    for network, parameters in shapes.items():
        for name, shape in parameters.items():
            module, _, parameter = name.rpartition(".")
            targets[Target(network, module, cast(Parameter, parameter))] = shape
    return targets


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
