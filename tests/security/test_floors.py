"""Versions below which a known hole is open are refused by our own requirements, and are not what is installed here."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
# Why each: docs/security-checks.md
FLOORS = {
    "Pillow": "13",
    "diffusers": "0.42.1",
    "torch": "2.6",
    "python-multipart": "0.0.18",
    "fastapi": "0.165",
    "uvicorn": "0.40",
    "safetensors": "0.6",
    "transformers": "5",
    "httpcore": "1.0.9",
    "starlette": "1.3.1",
}


def required() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {item.name: item for item in map(Requirement, project["dependencies"])}


def lowest(requirement: Requirement) -> Version:
    [floor] = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return floor


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_hole_is_accepted(name):
    """By what we require; starlette, which comes with fastapi, is required by name for its floor."""
    assert lowest(required()[name]) >= Version(FLOORS[name])


@pytest.mark.parametrize("name", FLOORS)
def test_none_is_installed(name):
    """What the tests run with is above the floor, too."""
    assert Version(version(name)) >= Version(FLOORS[name])


def test_the_comparison_can_fail():
    """The control: an older floor would be seen."""
    assert lowest(Requirement("Pillow>=12.2,<14")) < Version(FLOORS["Pillow"])


def test_every_floor_is_explained():
    """docs/security-checks.md has each with its reason."""
    text = (ROOT / "docs/security-checks.md").read_text()
    for name, floor in FLOORS.items():
        assert re.search(rf"\| `{re.escape(name)}` \| {re.escape(floor)} \|", text), name
