"""Models that both we and diffusers run: a random one with SDXL's shape, and the one we ship."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from impasto.engine.engine import Engine
from impasto.models.catalog import BUILTIN_FOLDER
from tests.random_sdxl import save_random_sdxl


@pytest.fixture(scope="session", params=["random", "builtin"])
def model_folder(request, tmp_path_factory) -> Path:
    """A model folder; every parity test runs on both."""
    if request.param == "builtin":
        return BUILTIN_FOLDER
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "random-sdxl")


@pytest.fixture(scope="session")
def engine(model_folder) -> Engine:
    """Our engine on that folder, float32 on the CPU."""
    return Engine.load(str(model_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def pipeline(model_folder) -> StableDiffusionXLPipeline:
    """diffusers' pipeline on the same folder."""
    loaded = StableDiffusionXLPipeline.from_pretrained(
        model_folder, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded
