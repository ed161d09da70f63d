"""The command line: help that teaches, keys on standard output, errors in one line, pictures in files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from impasto.config import GenerateSettings, Settings
from tests.random_sdxl import save_random_sdxl

IMPASTO = Path(sys.executable).with_name("impasto")


def impasto(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run the command as a user does, wide enough that help lines do not wrap."""
    return subprocess.run(
        [IMPASTO, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


@pytest.mark.parametrize("command", [(), ("serve",), ("worker",), ("generate",), ("keys",), ("keys", "create")])
def test_every_command_has_help(command):
    """``--help`` works everywhere and says something."""
    run = impasto(*command, "--help")
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("command", "kind", "names"),
    [
        ("serve", Settings, ["host", "port", "data_dir", "model", "device", "dtype", "public_url", "log_level"]),
        ("generate", GenerateSettings, ["size", "steps", "guidance", "seed", "count", "lora", "model", "device"]),
    ],
)
def test_help_names_the_variable_and_the_default_of_each_option(command, kind, names):
    """What the help says comes from the settings themselves."""
    shown = impasto(command, "--help").stdout
    for name in names:
        assert f"--{name.replace('_', '-')}" in shown
        assert f"IMPASTO_{name.upper()}" in shown
        default = kind.model_fields[name].default
        assert default in (None, []) or f"Default: {default}" in shown


def test_keys_are_created_listed_and_revoked(tmp_path):
    """The key stands alone on standard output, once; the list shows its first characters only."""
    created = impasto("keys", "create", "phone", "--data-dir", tmp_path)
    key = created.stdout.strip()
    assert len(key) == 64
    assert created.stdout == key + "\n"
    listed = impasto("keys", "list", IMPASTO_DATA_DIR=str(tmp_path)).stdout
    assert "phone" in listed
    assert "active" in listed
    assert key not in listed
    assert impasto("keys", "revoke", "phone", "--data-dir", tmp_path).returncode == 0
    assert "revoked" in impasto("keys", "list", "--data-dir", tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "phrase"),
    [
        (("generate", "a fox", "--size", "100*100"), 2, "size must be between 512 and 1536"),
        (("generate", "a fox", "--steps", "99"), 2, "num_inference_steps must be between 1 and 50"),
        (("generate", "a fox", "-o", "fox.gif"), 2, "output must end in"),
        (("generate", "a fox", "--scheduler", "magic"), 2, "scheduler must be one of euler"),
        (("generate", " "), 2, "prompt must not be empty"),
        (("generate", "a fox", "--model", "nowhere"), 1, "'nowhere' was not found"),
        (("generate", "a fox", "--lora", "a:b"), 2, "PATH:SCALE"),
        (("generate", "a fox", "--lora", "gone.safetensors:0.5", "--steps", "1"), 1, "loras.0.path was not found"),
        (("serve", "--port", "99999", "--model", "fake"), 2, "port"),
        (("keys", "revoke", "nobody"), 1, "no key in use has this name"),
    ],
)
def test_mistakes_are_one_line_that_names_the_field(tmp_path, arguments, status, phrase):
    """No trace, a status that scripts can use, and nothing written."""
    run = impasto(*arguments, cwd=tmp_path)
    assert run.returncode == status
    assert phrase in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.glob("*.png"))


def test_generate_saves_numbered_pictures_of_the_asked_size(tmp_path):
    """Two pictures, their seeds said, options taken from the environment where not given."""
    folder = save_random_sdxl(tmp_path / "model")
    run = impasto(
        "generate", "a fox", "-o", tmp_path / "new" / "fox.jpg", "--model", folder, "--steps", "1", "--seed", "5",
        IMPASTO_COUNT="2", IMPASTO_SIZE="520x512",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for i in range(2):
        with Image.open(tmp_path / "new" / f"fox-{i}.jpg") as picture:
            assert (picture.format, picture.size) == ("JPEG", (520, 512))
        assert f"fox-{i}.jpg  seed {5 + i}" in run.stderr
