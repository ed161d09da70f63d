"""The deployment files are files of their kind, speak of settings that exist, and keep what the documents promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from impasto.config import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path.name for path in DEPLOY.iterdir())
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("name", FILES)
def test_every_setting_that_a_file_names_exists(name):
    """A misspelt variable would stop the start; those of compose alone are told apart."""
    own = {"IMPASTO_MEMORY"}
    named = set(re.findall(rf"\b({PREFIX}[A-Z0-9_]+)", (DEPLOY / name).read_text())) - own
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    assert named <= known, named - known


def test_every_file_is_described():
    """docs/deploy.md names each, and settings in its text exist."""
    text = (ROOT / "docs/deploy.md").read_text()
    assert all(f"deploy/{name}" in text for name in FILES)
    checklist = text.split("## Before strangers come")[1]
    settings = {word for word in re.findall(r"`([a-z_]+)(?: = [^`]*)?`", checklist) if "_" in word} - {"data_dir"}
    assert len(settings) > 8
    assert settings <= set(Settings.model_fields)


def test_values_in_the_files_are_ones_that_settings_take(monkeypatch, tmp_path):
    """What compose and the cluster set is read as settings, all together."""
    monkeypatch.chdir(tmp_path)
    config = next(item for item in KUBERNETES if item["kind"] == "ConfigMap")["data"]
    compose = {
        k: re.sub(r"\$\{\w+(:[-?])?([^}]*)\}", "x", v) for k, v in COMPOSE["services"]["impasto"]["environment"].items()
    }
    for values in (config, compose):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            assert Settings.load().trusted_proxies


def containers() -> list[dict]:
    pods = [item["spec"]["template"]["spec"] for item in KUBERNETES if item["kind"] == "Deployment"]
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
    return [container for pod in pods for container in pod["containers"]]


def test_the_cluster_runs_it_as_an_ordinary_user_with_nothing_to_write_to():
    """And with bounds on memory; secrets are in a Secret; names in selectors and ports fit together."""
    for container in containers():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
    kinds = {item["kind"]: item for item in KUBERNETES}
    assert set(kinds) == {
        "Namespace", "Secret", "ConfigMap", "Deployment", "Service", "Ingress", "NetworkPolicy"
    }  # fmt: skip
    assert kinds["Service"]["metadata"]["name"] != "impasto", "its variables would be read as settings"
    labels = [item["spec"]["template"]["metadata"]["labels"] for item in KUBERNETES if item["kind"] == "Deployment"]
    assert kinds["Service"]["spec"]["selector"] in labels
    backend = kinds["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == kinds["Service"]["metadata"]["name"]
    assert not re.search("password|secret|token|key", str(kinds["ConfigMap"]["data"]), re.I)
    closed = kinds["NetworkPolicy"]["spec"]["egress"][1]["to"][0]["ipBlock"]["except"]
    assert "169.254.0.0/16" in closed and "10.0.0.0/8" in closed


def test_the_container_is_an_ordinary_user_and_exposes_one_port():
    """Built from public images alone; compose opens no port of it to the world, and gives it no rights."""
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["python:${PYTHON}-slim-bookworm"] * 2
    assert re.search(r"^USER (?!root|0)", text, re.MULTILINE)
    assert "ADD http" not in text and "curl" not in text
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored
    service = COMPOSE["services"]["impasto"]
    assert "ports" not in service and "privileged" not in service
    assert (service["cap_drop"], service["read_only"]) == (["ALL"], True)
    assert COMPOSE["networks"]["back"]["internal"] is True


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="checks the unit")
def test_the_unit_is_one_and_is_confined(tmp_path):
    """systemd reads it without a complaint, and rates it as protected. The control: a unit with a mistake is told."""
    unit = (DEPLOY / "impasto.service").read_text().replace("/opt/impasto/bin/impasto", "/bin/true")
    (tmp_path / "impasto.service").write_text(unit)
    (tmp_path / "wrong.service").write_text(unit.replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))

    def verify(name: str) -> str:
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
        return "\n".join(line for line in done.stderr.splitlines() if name in line)

    assert "NoNewPrivilege" in verify("wrong.service")
    assert verify("impasto.service") == ""


def test_the_proxies_files_balance_and_name_our_paths():
    """Braces close, and the paths that they treat apart are ones that the service has."""
    for name in ("nginx.conf", "Caddyfile"):
        text = re.sub(r"#.*", "", (DEPLOY / name).read_text())
        assert text.count("{") == text.count("}")
    nginx = (DEPLOY / "nginx.conf").read_text()
    assert "access_log off" in nginx and "Strict-Transport-Security" in nginx
    [events, uploads] = re.findall(r"location ~ (\S+)", nginx)
    assert re.search(events, "/api/v3/predictions/0123/events")
    assert re.search(events, "/v1/images/generations")
    assert re.search(uploads, "/api/v3/media/upload/binary")
