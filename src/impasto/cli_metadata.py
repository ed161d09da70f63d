"""What the pictures of ``impasto generate``, and videos of ``animate``, tell of how they were made: as the service's.

Knows the command's request, its LoRAs by the words that the user wrote, and the settings. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from impasto.cli_options import name_and_scale
from impasto.config import Settings
from impasto.images import CONTENT_TYPES, encode_image
from impasto.types import GenerationRequest, OutputFormat, VideoFormat, VideoReady
from impasto.video import VIDEO_TYPES, encode_video
from impasto.worker.loras import FoundLora
from impasto.worker.provenance import Provenance, Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


class Teller:
    """Writes pictures into files with their parameters, where the settings want that.

    Large models take seconds to hash, which is done beside the drawing: begin it when the model is there.

    Args:
        request: With its LoRAs' files.
        loras: These LoRAs as the user named them.
        settings: Of the model in use.
    """

    def __init__(self, request: GenerationRequest, loras: Sequence[str], settings: Settings) -> None:
        found = [FoundLora(Path(lora.path), "file") for lora in request.loras]
        named = [replace(lora, path=name_and_scale(text)[0]) for lora, text in zip(request.loras, loras, strict=True)]
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._recipe: Future[Recipe | None] = self._hashing.submit(
            _recipe, replace(request, loras=tuple(named)), found, settings
        )
        self._hashing.shutdown(wait=False)

    def encoded(self, image: Image, seed: int, file_format: OutputFormat) -> bytes:
        """Return the file of one picture.

        Raises:
            ConfigError: It cannot be signed as the settings ask.
        """
        recipe = self._recipe.result()
        if recipe is None:
            return encode_image(image, file_format)
        return recipe.signed(encode_image(image, file_format, recipe.text(seed)), CONTENT_TYPES[file_format])

    def video(self, made: VideoReady, file_format: VideoFormat) -> bytes:
        """Return the file of a video.

        Raises:
            ConfigError: It cannot be signed as the settings ask, or PyAV is missing.
        """
        recipe = self._recipe.result()
        data = encode_video(made.frames, made.fps, file_format, recipe.text(made.seed) if recipe else None)
        return recipe.signed(data, VIDEO_TYPES[file_format]) if recipe else data


def _recipe(request: GenerationRequest, found: Sequence[FoundLora], settings: Settings) -> Recipe | None:
    """Return what the service would note, but for the record of a row that there is none of."""
    own = settings.model_copy(update={"reproduction_record": False, "refiner": None})
    return Provenance.of(own, settings.device).recipe(request, found, wanted=True)
