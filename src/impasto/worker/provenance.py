"""What it takes to make a picture again: which weights, which programs, which device.

Knows files by their hashes and programs by their versions. Knows no engine and no torch. Nothing that it writes has a
folder of this machine, an address with a token or a key in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from impasto.config import Settings
from impasto.errors import ImpastoError
from impasto.metadata import Ingredient, parameters_text
from impasto.models.catalog import find_model
from impasto.types import GenerationRequest
from impasto.worker.credentials import ContentCredentials
from impasto.worker.loras import FoundLora
from impasto.worker.naming import FAKE_MODEL

if TYPE_CHECKING:
    from PIL.Image import Image

PROGRAMS: Final = ("impasto", "torch", "diffusers", "transformers")
HASHES_FILE: Final = "model-hashes.json"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_PLAIN: Final = re.compile(r"[^\w.@+-]+")
_SHOWN: Final = 60  # characters of a name

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One job's: what goes into its files and its row.

    Attributes:
        record: For the row, as JSON values; ``None``: nothing is to be told.
        embeds: Whether the pictures' files tell it, too.
        credentials: What signs the files; ``None``: nothing does.
    """

    request: GenerationRequest
    model: Ingredient
    loras: tuple[Ingredient, ...]
    record: Mapping[str, Any] | None
    embeds: bool
    credentials: ContentCredentials | None = None

    def text(self, seed: int) -> str | None:
        """Return what to write into the file of the picture with this seed; ``None``: nothing."""
        if not self.embeds:
            return None
        return parameters_text(self.request, seed, self.model, self.loras, version("impasto"))

    def signed(self, data: bytes, content_type: str) -> bytes:
        """Return a picture's file with its credentials, or as it is."""
        return self.credentials.signed(data, content_type) if self.credentials else data


class Provenance:
    """A worker's: how it is set up, and from there each job's recipe.

    Args:
        model: The base model.
        setup: What the record says of the worker, as JSON values; ``None``: there are no records.
        embeds: Whether pictures' files tell how they were made, unless a request declines.
        credentials: What signs pictures' files, whatever a request says.
    """

    def __init__(
        self,
        model: Ingredient = Ingredient("unknown"),  # noqa: B008  (frozen)
        setup: Mapping[str, Any] | None = None,
        *,
        embeds: bool = False,
        credentials: ContentCredentials | None = None,
    ) -> None:
        self._model = model
        self._setup = setup
        self._embeds = embeds
        self._credentials = credentials

    @classmethod
    def of(cls, settings: Settings, device: str) -> Provenance:
        """Describe a worker whose model is loaded, and thus on disk; hashing it takes seconds, once for each file.

        Raises:
            ConfigError: Pictures cannot be signed as the settings ask.
        """
        credentials = ContentCredentials.of(settings)
        if not settings.embed_metadata and not settings.reproduction_record:
            return cls(credentials=credentials)
        known = _KnownHashes(settings.data_dir / HASHES_FILE)
        model = _model(settings.model, known)
        setup: dict[str, Any] = {"programs": _versions(), "device": device, "dtype": settings.dtype}
        setup |= {"accel": settings.accel} if settings.accel else {}
        setup["model"] = {"name": model.name, "sha256": model.sha256}
        if settings.refiner:
            refiner = _model(settings.refiner, known)
            setup["refiner"] = {"name": refiner.name, "sha256": refiner.sha256}
        record = setup if settings.reproduction_record else None
        return cls(model, record, embeds=settings.embed_metadata, credentials=credentials)

    def recipe(self, request: GenerationRequest, found: Sequence[FoundLora], wanted: bool) -> Recipe | None:
        """Return a job's; its LoRAs are hashed, so call it where that may take a moment.

        Args:
            request: With its pictures, and with the LoRAs in the order of ``found``.
            found: Its LoRAs' files.
            wanted: Whether the request has something against telling it in the files.
        """
        embeds = self._embeds and wanted
        if not embeds and self._setup is None and self._credentials is None:
            return None
        loras = tuple(
            Ingredient(plain_name(lora.path), _file_hash(one.file), lora.scale)
            for lora, one in zip(request.loras, found, strict=True)
        )
        record = None if self._setup is None else {**self._setup, "loras": _told(loras, found, request)}
        pictures = {"image": request.image, "mask_image": request.mask_image}
        hashes = {name: _pixels_hash(picture) for name, picture in pictures.items() if picture is not None}
        if record is not None and hashes:
            record["pictures"] = hashes
        return Recipe(request, self._model, loras, record, embeds, self._credentials)


def _told(loras: Sequence[Ingredient], found: Sequence[FoundLora], request: GenerationRequest) -> list[dict[str, Any]]:
    told = []
    for lora, one, asked in zip(loras, found, request.loras, strict=True):
        text = {} if asked.text_scale is None else {"text_scale": asked.text_scale}
        told.append({"source": one.source, "sha256": lora.sha256, "scale": lora.scale, **text})
    return told


def plain_name(text: str) -> str:
    """Return the last part of a path or address, without its ending, query or anything that is no plain letter."""
    last = re.split(r"[?#]", text)[0].rstrip("/").replace("\\", "/").rpartition("/")[2]
    return _PLAIN.sub("_", last.removesuffix(".safetensors").removesuffix(".tar"))[:_SHOWN] or "unnamed"


def _versions() -> dict[str, str]:
    found = {}
    for name in PROGRAMS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _model(name: str, known: _KnownHashes) -> Ingredient:
    """Return a model by a name without folders, and its hash: of its one file, or over those of its parts."""
    if name == FAKE_MODEL:
        return Ingredient(FAKE_MODEL)
    try:
        from impasto.models.hub import cached_model

        source = find_model(name, cached_model)
    except (ImpastoError, OSError) as error:
        log.warning("the model's hash is not known, and pictures will not tell it: %s", error)
        return Ingredient(plain_name(name))
    if source.path.is_file():
        return Ingredient(plain_name(name), known.of(source.path))
    files = sorted(source.path.glob("*/*.safetensors"))
    lines = [f"{file.relative_to(source.path).as_posix()} {known.of(file)}\n" for file in files]
    return Ingredient(plain_name(name), hashlib.sha256("".join(lines).encode()).hexdigest())


def _file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, read once for as long as it does not change."""
    state = path.stat()
    return _hashed(path, state.st_mtime_ns, state.st_size)


@lru_cache(256)
def _hashed(path: Path, changed: int, size: int) -> str:
    if _SHA256.fullmatch(path.stem) and path.parent.name == "blobs":  # a cache's: its name is its hash
        return path.stem
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pixels_hash(image: Image) -> str:
    """Return the SHA-256 of a picture's size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


class _KnownHashes:
    """Hashes of large files, kept between starts by path, size and time of change."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._known: dict[str, Any] = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file's content."""
        real = path.resolve()
        if _SHA256.fullmatch(real.name) and real.parent.name == "blobs":  # the hub's cache, likewise
            return real.name
        state = real.stat()
        mark = [state.st_size, state.st_mtime_ns]
        match self._known.get(str(real)):
            case [size, changed, str(digest)] if [size, changed] == mark:
                return digest
        digest = _file_hash(real)
        self._known[str(real)] = [*mark, digest]
        self._keep()
        return digest

    def _keep(self) -> None:
        if not self._file.parent.is_dir():  # a command that runs beside no service
            return
        part = self._file.with_suffix(f".{os.getpid()}")
        try:
            part.write_text(json.dumps(self._known))
            os.replace(part, self._file)
        except OSError as error:  # it is hashed again at the next start, then
            log.warning("hashes of the model's files are not kept: %s", error.strerror)
