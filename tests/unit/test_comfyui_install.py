"""``impasto comfyui``: the pack goes in, again and again, and out; only into a ComfyUI, over nothing but itself."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from impasto.comfyui import NODES
from impasto.comfyui.install import LEAST, check_comfyui, install, pythons_without_us, uninstall, write_pack
from impasto.errors import ConfigError

IMPASTO = Path(sys.executable).with_name("impasto")
PACKAGE = Path(__file__).parents[2] / "src" / "impasto" / "comfyui"
EXAMPLES = PACKAGE / "example_workflows"


@pytest.fixture
def comfyui(tmp_path):
    """What tells a ComfyUI, and nothing else of it."""
    folder = tmp_path / "ComfyUI"
    for name in ("comfy", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py", "folder_paths.py"):
        (folder / name).touch()
    (folder / "comfyui_version.py").write_text('# generated\n__version__ = "0.3.64"\n')
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([IMPASTO, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment)


def test_installing_twice_is_installing_once(comfyui):
    """The second time leaves what the first did, and takes away what is no longer ours."""
    folder = install(comfyui)
    first = files(folder)
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "web/settings.js"} <= set(first)
    (folder / "from-an-older-version.js").touch()
    assert install(comfyui) == folder == comfyui / "custom_nodes" / "impasto"
    assert files(folder) == first
    assert uninstall(comfyui) == folder and not folder.exists()
    assert uninstall(comfyui) is None


def test_nodes_elsewhere(comfyui, tmp_path):
    """A ComfyUI with a base directory has its custom nodes there."""
    (tmp_path / "nodes").mkdir()
    assert install(comfyui, tmp_path / "nodes") == tmp_path / "nodes" / "impasto"
    assert not (comfyui / "custom_nodes" / "impasto").exists()
    with pytest.raises(ConfigError, match="--custom-nodes"):
        install(comfyui, tmp_path / "nowhere")


def test_what_is_no_comfyui_is_said(comfyui, tmp_path):
    """An empty folder, no folder, and one whose version is not told."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"is not ComfyUI's folder.*main\.py"):
            install(folder)
    (comfyui / "comfyui_version.py").unlink()
    with pytest.raises(ConfigError, match="which version"):
        install(comfyui)


@pytest.mark.parametrize(
    ("has", "so"), [("0.3.63", False), ("0.2.99", False), ("0.3.64", True), ("0.3.100", True), ("1.0.0", True)]
)
def test_older_versions_are_refused_by_number(comfyui, has, so):
    """0.3.100 is later than 0.3.64, and the refusal names both."""
    (comfyui / "comfyui_version.py").write_text(f'__version__ = "{has}"\n')
    if so:
        assert check_comfyui(comfyui) == has
    else:
        with pytest.raises(ConfigError, match=rf"{re.escape(has)}.*0\.3\.64"):
            check_comfyui(comfyui)


def test_somebody_elses_folder_is_left_alone(comfyui):
    """A folder of the same name that is not ours is neither replaced nor deleted."""
    theirs = comfyui / "custom_nodes" / "impasto"
    theirs.mkdir()
    (theirs / "precious.txt").write_text("mine")
    for change in (install, uninstall):
        with pytest.raises(ConfigError, match="not our pack"):
            change(comfyui)
    assert files(theirs) == {"precious.txt": b"mine"}


@pytest.mark.parametrize(("code", "lacks"), [(1, True), (0, False)])
def test_comfyuis_own_python_is_tried(comfyui, code, lacks):
    """A virtual environment inside ComfyUI that lacks the package is found; one that has it is fine."""
    python = comfyui / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    assert list(pythons_without_us(comfyui)) == ([python] if lacks else [])


def test_the_command(comfyui):
    """It says what it did and what is next; what is wrong is one line and status 2; help teaches."""
    done = run("comfyui", "install", comfyui)
    assert done.returncode == 0 and "custom_nodes/impasto" in done.stderr and "restart" in done.stderr
    wrong = run("comfyui", "install", comfyui.parent)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert run("comfyui", "uninstall", comfyui).returncode == 0
    taught = run("comfyui", "install", "--help").stdout
    for words in ("pip install impasto", "IMPASTO_SERVER_URL", "0.3.64", "keys create"):
        assert words in taught
    pack = comfyui.parent / "dist" / "impasto"
    assert run("comfyui", "pack", pack).returncode == 0 and (pack / "pyproject.toml").is_file()


def test_what_the_registry_reads(tmp_path):
    """A name without comfyui in it, three numbers, the package as the one dependency, and the least ComfyUI."""
    write_pack(tmp_path / "pack")
    read = tomllib.loads((tmp_path / "pack" / "pyproject.toml").read_text())
    project, comfy = read["project"], read["tool"]["comfy"]
    assert "comfyui" not in project["name"] and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert Version(project["version"]) == Version(version("impasto"))
    assert project["dependencies"] == (tmp_path / "pack" / "requirements.txt").read_text().split()
    assert comfy["requires-comfyui"] == ">=" + ".".join(map(str, LEAST))
    assert comfy["PublisherId"] and comfy["DisplayName"]


def test_the_shim_says_what_is_missing(tmp_path):
    """In a Python without our package, loading the pack fails with the command that mends it."""
    write_pack(tmp_path / "impasto_nodes")
    check = [sys.executable, "-S", "-c", "import impasto_nodes"]
    failed = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}, check=False)
    assert "-m pip install impasto" in failed.stderr.splitlines()[-1]


def test_the_pack_is_loaded_without_comfyuis_libraries():
    """Importing the package starts nothing: neither torch nor ComfyUI."""
    check = "import sys, impasto.comfyui; sys.exit(bool({'torch', 'comfy_api', 'httpx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(name for name in NODES if (PACKAGE / f"{name}.py").is_file()))
def test_every_listed_node_is_there(name):
    """The list has no module that is not in the package, and each class stands in its module."""
    text = (PACKAGE / f"{name}.py").read_text()
    for node in NODES[name]:
        assert f"class {node}(io.ComfyNode)" in text


@pytest.mark.parametrize("name", sorted(file.stem for file in (EXAMPLES / "api").glob("*.json")))
def test_examples_come_in_both_forms_with_a_picture(name):
    """Each has a page's form with the same nodes, and a thumbnail; neither holds an address or a key."""
    api = json.loads((EXAMPLES / "api" / f"{name}.json").read_text())
    text = (EXAMPLES / f"{name}.json").read_text()
    kinds = sorted(node["type"] for node in json.loads(text)["nodes"])
    assert kinds == sorted(node["class_type"] for node in api.values())
    assert "http" not in text.replace("https://docs", "") and "Bearer" not in text
    assert (EXAMPLES / f"{name}.jpg").stat().st_size < 300_000


def test_no_example_is_without_its_other_form():
    """What the page shows can be run by the tests, too."""
    assert {file.stem for file in EXAMPLES.glob("*.json")} == {file.stem for file in (EXAMPLES / "api").glob("*.json")}
