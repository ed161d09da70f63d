"""Reports of LoRAs as the text that a node gives out.

Knows the report's rows. Knows no nodes and no files.
"""

from __future__ import annotations

from collections.abc import Sequence

from impasto.lora.report import LoraReport


def report_text(reports: Sequence[LoraReport]) -> str:
    """Return one paragraph for each LoRA: its line, then what the line has no room for."""
    return "\n\n".join(_paragraph(report) for report in reports) or "No LoRA."


def _paragraph(report: LoraReport) -> str:
    told = {"LoRA", "kinds", "applied", "rank"}  # by the line
    rows = [f"  {label}: {text}".replace("\n", "\n    ") for label, text in report.rows() if label not in told]
    return "\n".join([report.line(), *rows])
