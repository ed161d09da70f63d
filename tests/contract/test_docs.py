"""The documents tell the truth: paths exist, settings and dependencies are all listed, README code runs."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from impasto.cli import app
from impasto.config import GenerateSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "training/README.md",
    "src/impasto/models/builtin/README.md", "src/impasto/models/builtin/loras/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]  # fmt: skip
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_links_to_exists(document):
    """Links inside the repository lead somewhere."""
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (file.parent / target).exists(), f"{document} links to {target}"


def test_the_life_of_a_request_names_real_files_in_nine_steps():
    """ARCHITECTURE.md has nine steps, each naming at least one source file that exists."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    steps = re.findall(r"^\d\. .*?(?=^\d\. |^## )", text, re.MULTILINE | re.DOTALL)
    assert len(steps) == 9
    for step in steps:
        named = re.findall(r"`(src/[^`]+)`", step)
        assert named
        assert all((ROOT / path).is_file() for path in named)


def test_every_setting_is_documented_with_its_default():
    """docs/settings.md has a row for each field of the settings."""
    text = (ROOT / "docs/settings.md").read_text()
    for name, field in (Settings.model_fields | GenerateSettings.model_fields).items():
        default = "unset" if field.default is None else "none" if field.default in ([], "") else f"`{field.default}`"
        assert f"| `{name}` | {default} | {field.description} |" in text


def test_every_dependency_has_a_reason_and_a_range():
    """docs/dependencies.md and pyproject.toml name the same packages, each with a lower and an upper bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += [item for item in extra if not item.startswith("impasto[")]
    assert all(">=" in item and "<" in item for item in wanted)
    names = {re.split(r"[\[><=]", item)[0] for item in wanted}
    documented = set(re.findall(r"^\| `([\w.-]+)` \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE))
    assert documented == names


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_command_in_the_readme_parses():
    """Each ``impasto …`` line of the README is accepted by the command line's own parser."""
    command = get_command(app)
    lines = [line.split("#")[-1] for block in blocks("sh") for line in block.splitlines()]
    lines = [line.split("or:")[-1].strip() for line in lines if "impasto " in line and "curl" not in line]
    assert len(lines) >= 4
    for line in lines:
        name, *arguments = shlex.split(line.removeprefix("impasto "))
        sub = command.commands[name]
        sub.make_context(name, arguments)


def test_every_make_target_in_the_readme_exists():
    """`make demo`, `make test`, `make serve`."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert used
    assert used <= targets


def test_the_library_example_runs(tmp_path, monkeypatch):
    """The README's library block, as it stands, leaves a picture."""
    [code] = [block for block in blocks("python") if "Engine.load" in block]
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("seed=7", "seed=7, num_inference_steps=2"), "README.md", "exec"), {})
    assert (tmp_path / "apple.png").stat().st_size > 10_000
