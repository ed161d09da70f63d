"""LoRA files are read on the thread that fetched them, before the engine needs them."""

import os

import pytest

from impasto.worker.loras import LoraLibrary
from impasto.worker.warming import CHUNK, read_ahead


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_every_byte_is_read(tmp_path, size):
    """Of files below, at and above the size of a chunk."""
    (tmp_path / "f").write_bytes(os.urandom(size))
    assert read_ahead(tmp_path / "f") == size


def test_a_file_that_is_gone_is_left_to_whoever_parses_it(tmp_path):
    """It is their error to tell, with the field's name."""
    assert read_ahead(tmp_path / "gone") == 0


def test_finding_a_lora_reads_it(tmp_path, monkeypatch):
    """Whatever its name leads to."""
    (tmp_path / "me.safetensors").write_bytes(b"x" * 100)
    seen = []
    monkeypatch.setattr("impasto.worker.loras.read_ahead", lambda file: seen.append(file))
    LoraLibrary(tmp_path).find("me", "loras.0.path", None)
    assert seen == [tmp_path / "me.safetensors"]
