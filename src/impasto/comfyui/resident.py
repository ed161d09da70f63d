"""The engine that the local node keeps for as long as ComfyUI has room for it.

Knows ComfyUI's memory management, to which the engine is a loaded model like any other: what is in its way is unloaded
before it comes, and it goes when something else needs the room, or when the user has models unloaded. It is then
dropped whole and read again when it is asked for. Knows no requests.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import comfy.model_management  # type: ignore[import-not-found]
import torch
from comfy.model_patcher import ModelPatcher  # type: ignore[import-not-found]
from comfy.patcher_extension import CallbacksMP  # type: ignore[import-not-found]
from torch import nn

from impasto.engine.engine import Engine
from impasto.lora.cache import FileState
from impasto.models.catalog import BUILTIN, BUILTIN_FOLDER

log = logging.getLogger(__name__)

WORKING_BYTES: Final = 3 * 2**30  # beside the weights, for a picture or two at 1024 px; more images go in turns


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which models an engine is to have."""

    model: FileState | None  # None: the built-in one
    refiner: FileState | None = None

    @classmethod
    def now(cls, model: Path | None, refiner: Path | None) -> Wanted:
        """Look at the files as they are; another file under the same name is another model."""
        return cls(*(None if path is None else FileState.now(path) for path in (model, refiner)))

    @property
    def nbytes(self) -> int:
        """Bytes of the files, which is about what the weights will take."""
        files = (self.model, self.refiner)
        builtin = sum(file.stat().st_size for file in BUILTIN_FOLDER.rglob("*.safetensors"))
        return sum(file.size for file in files if file) + (builtin if self.model is None else 0)


Load = Callable[[Wanted, str], Engine]


def load_engine(wanted: Wanted, device: str) -> Engine:
    """Load an engine whose weights can be changed outside ComfyUI's inference mode as well."""
    with torch.inference_mode(False):
        return Engine.load(
            BUILTIN if wanted.model is None else str(wanted.model.path),
            refiner=None if wanted.refiner is None else str(wanted.refiner.path),
            device=device,
        )


class Resident:
    """Holds one engine at most. It belongs to the thread that runs ComfyUI's workflows.

    Args:
        load: Loads an engine for a device.
    """

    def __init__(self, load: Load = load_engine) -> None:
        self._load = load
        self._wanted: Wanted | None = None
        self._engine: Engine | None = None
        self._place: Any = None  # the ModelPatcher that stands for it in ComfyUI's list of loaded models

    @property
    def engine(self) -> Engine | None:
        """The engine, if it is there now."""
        return self._engine

    def get(self, wanted: Wanted) -> Engine:
        """Return an engine with these models, with room to work; load it if it is not here, or was dropped.

        Raises:
            ModelError: Not an SDXL model, or it cannot be read.
            ConfigError: Our engine cannot use ComfyUI's device.
        """
        if wanted != self._wanted:
            self.drop()
        if self._engine is None:
            self._place = self._new_place(wanted.nbytes)
        comfy.model_management.load_models_gpu([self._place], memory_required=WORKING_BYTES)
        if self._engine is None:
            self._engine = self._loaded(wanted)
        return self._engine

    def drop(self) -> None:
        """Let go of the engine and its memory."""
        self._engine = self._wanted = self._place = None
        gc.collect()
        comfy.model_management.soft_empty_cache()

    def _loaded(self, wanted: Wanted) -> Engine:
        try:
            engine = self._load(wanted, str(comfy.model_management.get_torch_device()))
        except BaseException:
            self.drop()
            raise
        self._wanted = wanted
        return engine

    def _new_place(self, size: int) -> Any:
        """Return what stands for an engine: no weights that ComfyUI could move, but their size."""
        device = comfy.model_management.get_torch_device()
        place = ModelPatcher(ImpastoEngine(), load_device=device, offload_device=torch.device("cpu"), size=size)
        place.add_callback(CallbacksMP.ON_DETACH, self._detached)
        return place

    def _detached(self, place: Any, unpatch_all: bool) -> None:
        """ComfyUI wants the room; without ``unpatch_all`` it only puts its list in order."""
        if unpatch_all and place is self._place:
            log.info("ComfyUI asked for memory: the Impasto engine is dropped, and loaded again when it is needed")
            self.drop()


class ImpastoEngine(nn.Module):
    """The name by which ComfyUI's log calls the engine."""
