"""Model names: the built-in one and folders are found; anything else is told what it is."""

import json

import pytest

from impasto.errors import ModelError
from impasto.models.catalog import PARTS, PIPELINE, find_model


def folder(path, kind=PIPELINE, without=()):
    """A diffusers folder with nothing inside its parts."""
    for part in set(PARTS) - set(without):
        (path / part).mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return str(path)


def test_builtin_is_found():
    """The model that ships."""
    source = find_model("builtin")
    assert source.native_side == 512
    assert source.index["_class_name"] == PIPELINE


def test_a_folder_is_found_by_its_path(tmp_path):
    """Any complete diffusers folder."""
    source = find_model(folder(tmp_path / "m"))
    assert source.path == tmp_path / "m"
    assert source.native_side == 1024


def test_a_file_is_a_checkpoint(tmp_path):
    """What kind of checkpoint is told when it is loaded."""
    (tmp_path / "file.safetensors").write_bytes(b"x")
    assert find_model(str(tmp_path / "file.safetensors")).path.name == "file.safetensors"


def test_what_is_not_an_sdxl_folder_is_told_so(tmp_path):
    """Each mistake has its own sentence."""
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{")
    cases = {
        "nowhere": "not found",
        str(tmp_path / "empty"): "no model_index.json",
        str(broken): "not JSON",
        folder(tmp_path / "sd15", "StableDiffusionPipeline"): "StableDiffusionPipeline, not an SDXL",
        folder(tmp_path / "part", without=["vae", "unet"]): "lacks unet, vae",
    }
    for name, phrase in cases.items():
        with pytest.raises(ModelError, match=phrase):
            find_model(name)
