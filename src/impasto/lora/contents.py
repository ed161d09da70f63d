"""What a LoRA file turned out to hold: the patches for this model, and what was left over, for the report.

Knows the words of the report. Knows no files, names or formulas: ``formats`` fills this in, ``apply`` uses the patches,
``report`` tells the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from impasto.lora.bundles import Bundle
from impasto.lora.keys import Target
from impasto.lora.patch import Patch


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A module that is in the model under that name, with another shape."""

    module: str  # as the file names it
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraContents:
    """A LoRA file, read for one model.

    Attributes:
        patches: What to do to each parameter of the model.
        unmatched: Modules of the file that this model does not have, as the file names them.
        mismatched: Modules that the model has in another shape.
        ignored: Keys that are no weights of modules and were passed over.
        bundles: Embeddings that came along, those that cannot be used too (whose keys are ignored).
        unscaled: Modules in PEFT's names of which nothing tells the alpha.
        base_model: What the file was trained for, as far as shapes and metadata tell: ``SDXL``, ``SDXL refiner``,
            ``SD 1.5``, ``SD 2``, ``unknown``, ….
        trigger_words: From the metadata, the most frequent first.
        metadata: The header's strings.
        sha256: Of the whole file, in hexadecimal.
    """

    patches: Mapping[Target, Patch]
    unmatched: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    ignored: tuple[str, ...] = ()
    bundles: tuple[Bundle, ...] = ()
    unscaled: int = 0
    base_model: str = "unknown"
    trigger_words: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
