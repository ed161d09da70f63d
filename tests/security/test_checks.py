"""docs/security-checks.md tells the truth: each test that it names exists, and no advisory is left out."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.security.test_memory import BOUND_MB

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/security-checks.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
ADVISORIES = [
    "CVE-2024-12029", "CVE-2024-11042", "CVE-2025-6237", "CVE-2024-10099", "CVE-2026-56670", "CVE-2026-56671",
    "CVE-2026-56672", "CVE-2026-56673", "CVE-2026-56674", "ComfyUI#12285", "CVE-2026-123790", "CVE-2024-21574",
    "CVE-2025-67303", "CVE-2026-22777", "CVE-2024-21575", "CVE-2024-21576", "CVE-2024-31462", "CVE-2026-44513",
    "GHSA-4prv-5hj7-c2xr", "diffusers#13761", "CVE-2026-34753", "CVE-2026-45400", "CVE-2026-45401",
    "CVE-2026-54020", "GHSA-j2hp-6m75-v4j4", "PYSEC-2023-298", "GHSA-8g5g-8vmr-9782", "CVE-2026-112403",
    "CVE-2026-112398", "CVE-2026-40192", "CVE-2026-55379", "CVE-2026-55380", "CVE-2026-54059", "CVE-2025-62727",
    "CVE-2025-54121", "CVE-2024-47874",
]  # fmt: skip


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_is_named_exists(file, name):
    """A renamed test must not leave its row unguarded."""
    assert name in functions_of(file)


def test_every_row_names_a_test():
    """No row is a mere claim, and the search for names finds them."""
    assert len(NAMED) > 50
    for section in ("Advisories", "Fetching", "Files", "HTTP"):
        part = TEXT.split(f"## {section}\n")[1].split("\n## ")[0]
        rows = [line for line in part.splitlines() if line.startswith("| ")][2:]
        assert rows
        assert all("::test_" in row for row in rows), section


@pytest.mark.parametrize("advisory", ADVISORIES)
def test_no_advisory_is_left_out(advisory):
    """The list stands here a second time, so that none is lost in editing."""
    assert advisory in TEXT


def test_the_bound_of_memory_is_the_one_that_is_tested():
    """The number in the document is the number in the test."""
    assert f"{BOUND_MB:,} MB" in TEXT
