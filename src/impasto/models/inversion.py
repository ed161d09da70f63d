"""Textual-inversion files: learned vectors that a word of the prompt stands for, one set for each text encoder.

Knows the safetensors format and the layouts SDXL trainers write. Knows no prompts, tokenizers or networks. A file that
is not one of these layouts is refused by name; a pickle is never opened.

Source: Gal et al. 2022 (arXiv:2208.01618).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from impasto.errors import InvalidInput
from impasto.types import EmbeddingRef
from impasto.wordvectors import FLOATS, misfit

FILES_KEPT = 32  # in memory; at most 0.6 MB each
MAX_SHOWN = 60  # characters of a key repeated in an error

LAYOUTS = (  # the keys of the first and the second encoder
    ("clip_l", "clip_g"),  # kohya, OneTrainer, ComfyUI, diffusers' advanced trainer
    ("text_encoders_0", "text_encoders_1"),  # cog-sdxl's embeddings.pti, diffusers' pivotal tuning
)
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}  # by the width of their only text encoder
PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save's files begin, new and old

_OTHER_KINDS = (  # what a file is, by a part of a key that only it has
    (".lora_", "a LoRA: give it in loras"),
    (".hada_w1", "a LoRA (LoHa): give it in loras"),
    (".lokr_w1", "a LoRA (LoKr): give it in loras"),
    ("model.diffusion_model.", "a checkpoint"),
    ("transformer_blocks.", "a network's weights"),
    ("text_model.", "a text encoder's weights"),
)


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """A textual-inversion file as it was when a request asked for it, and the word that stands for it."""

    token: str
    path: Path
    modified: int  # nanoseconds since 1970
    size: int  # bytes
    field: str  # the request field that named it, for errors


@dataclass(frozen=True, slots=True)
class BroughtEmbedding:
    """A word whose vectors another file brought, a LoRA; that file as it was, and the word, are what it is.

    Attributes:
        vectors: Of each text encoder, ``[n, width]``, float32, as ``wordvectors.misfit`` wants them.
    """

    token: str
    path: Path
    modified: int  # nanoseconds since 1970
    size: int  # bytes
    vectors: tuple[Tensor, ...] = dataclasses.field(compare=False, repr=False)


WordEmbedding = EmbeddingFile | BroughtEmbedding


def resolve_embeddings(refs: Sequence[EmbeddingRef]) -> tuple[EmbeddingFile, ...]:
    """Look the files up as they are now. A file that is replaced on disk makes another set.

    Raises:
        InvalidInput: There is no such file, or two of them have the same word.
    """
    found: list[EmbeddingFile] = []
    for position, ref in enumerate(refs):
        field = f"embeddings.{position}"
        if any(ref.token == other.token for other in found):
            raise InvalidInput(f"{field}.token", f"is given twice: {ref.token!r}; give each file its own word")
        path = Path(ref.path)
        if not path.is_file():
            raise InvalidInput(f"{field}.path", f"was not found: {path.name!r} is not a file here")
        stat = path.stat()
        found.append(EmbeddingFile(ref.token, path.resolve(), stat.st_mtime_ns, stat.st_size, f"{field}.path"))
    return tuple(found)


def read_embedding(file: WordEmbedding, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Read the vectors of a file, from memory if it was read before.

    Args:
        file: What ``resolve_embeddings`` found, or a LoRA brought.
        widths: Width of each encoder's token embeddings, SDXL's (768, 1280). One width alone is the second
            encoder's: a refiner has no other.

    Returns:
        For each encoder ``[n, width]``, float32, with the same n (at most ``MAX_VECTORS``). Not to be written to.

    Raises:
        InvalidInput: Not safetensors, another kind of file, for other encoders, or numbers that are not finite.
    """
    if isinstance(file, BroughtEmbedding):
        return file.vectors[-len(widths) :]
    try:
        return _read(file.path, file.modified, file.size, widths)
    except _Unfit as problem:
        raise InvalidInput(file.field, str(problem)) from None


class _Unfit(Exception):
    """Why a file cannot be used; the request's field is added by the caller, who knows it."""


@lru_cache(FILES_KEPT)
def _read(path: Path, modified: int, size: int, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    try:
        stat = path.stat()
        if (stat.st_mtime_ns, stat.st_size) != (modified, size):
            raise _Unfit("was replaced while it was being read; ask again")
        if _is_pickle(path):
            raise _Unfit("is a pickle, and reading one can run any code; convert it to .safetensors")
        with safe_open(path, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            keys = _layout(shapes)[-len(widths) :]
            if unfit := [key for key in keys if opened.get_slice(key).get_dtype() not in FLOATS]:
                raise _Unfit(f"holds {unfit[0]!r} in a number format that is not {', '.join(FLOATS)}")
            if problem := misfit([shapes[key] for key in keys], widths):
                raise _Unfit(problem)
            # Copies: what safetensors returns is the file's own pages, which change if it is written over.
            tensors = tuple(opened.get_tensor(key).to(torch.float32, copy=True) for key in keys)
    except (SafetensorError, OSError) as error:
        raise _Unfit(f"is not a whole safetensors file ({type(error).__name__}); fetch it again") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise _Unfit("holds numbers that are not finite")
    return tuple(tensor.reshape(-1, width) for tensor, width in zip(tensors, widths, strict=True))


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, which may look like a pickle's mark, and then a brace.
    return start.startswith(PICKLES) and not start.endswith(b"{")


def _layout(shapes: dict[str, tuple[int, ...]]) -> tuple[str, str]:
    """Return the keys of the two encoders' vectors, or say what the file is instead."""
    for layout in LAYOUTS:
        if set(layout) == shapes.keys():
            return layout
    for part, kind in _OTHER_KINDS:
        if any(part in key for key in shapes):
            raise _Unfit(f"is {kind}, not a textual-inversion embedding")
    known = {key for layout in LAYOUTS for key in layout}
    if len(shapes) == 1:
        [(key, shape)] = shapes.items()
        width = shape[-1] if shape else 0
        family = f", as for {FAMILIES[width]}" if width in FAMILIES and key not in known else ""
        raise _Unfit(
            f"is not for SDXL: it has vectors for one text encoder ({key[:MAX_SHOWN]!r}, {width} wide{family}); "
            "SDXL needs clip_l and clip_g"
        )
    strange = min(shapes.keys() - known, default="no tensors")
    raise _Unfit(f"is not an SDXL embedding: it holds {strange[:MAX_SHOWN]!r} where only clip_l and clip_g belong")
