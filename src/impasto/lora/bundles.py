"""Embeddings that a LoRA file brings along: words it was trained with, and the vectors they stand for.

Knows the keys that trainers pack them under (``bundle_emb.WORD.clip_l`` and ``.clip_g``), and says of every one that
cannot be used why. Knows no prompts, and nothing of the LoRA beside them.

Source: OneTrainer's LoRA savers, which write these keys, and AUTOMATIC1111's web UI, which reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from impasto.lora.tensors import bundled_word
from impasto.tensorfile import TensorInfo
from impasto.wordvectors import misfit

MAX_WORDS: Final = 64  # of a file; trainers write one or a few
PARTS: Final = ("clip_l", "clip_g")  # of the first and the second text encoder
_PART: Final = re.compile(r"bundle_emb\.(?P<word>.+)\.(?P<part>(?:clip_[lg]|t5)(?:_out)?)")
_OUTPUT: Final = "_out"  # OneTrainer's embeddings that take the place of the encoders' output, not of tokens


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A word that came with a LoRA.

    Attributes:
        word: Empty where the file does not tell it.
        keys: Of its tensors in the file.
        vectors: Of each text encoder, ``[n, width]``, float32, not to be written to; none where there is a problem.
        problem: Why it cannot be used, as what follows ``it``; empty: it can.
    """

    word: str
    keys: tuple[str, ...]
    vectors: tuple[Tensor, ...] = ()
    problem: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return len(self.word) + sum(vector.nbytes for vector in self.vectors)


def read_bundles(
    keys: Iterable[str], tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor], widths: tuple[int, ...]
) -> tuple[Bundle, ...]:
    """Read the words among a file's keys, usable ones and others, in the order of their names.

    Args:
        keys: Of the file, those that are no adapters'.
        tensors: What its header says of them.
        read: Reads one of its tensors.
        widths: Of both text encoders' token embeddings; empty where the model at hand has not both.
    """
    words: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        part = _PART.fullmatch(key)
        if (word := part["word"] if part else bundled_word(key)) is not None:
            words.setdefault(word, {})[part["part"] if part else key] = key
    bundles = []
    for place, (word, parts) in enumerate(words.items()):
        many = f"is one of more than {MAX_WORDS} words in one file" if place >= MAX_WORDS else None
        problem = many or _misfit(word, parts, tensors, widths)
        bundles.append(_read(word, parts, read) if problem is None else _unused(word, parts, problem))
    return tuple(bundles)


def _misfit(
    word: str, parts: Mapping[str, str], tensors: Mapping[str, TensorInfo], widths: tuple[int, ...]
) -> str | None:
    """Say what is wrong with a word's tensors as far as the header tells."""
    if not word.strip():
        return "stands there without its word"
    if any(part.endswith(_OUTPUT) for part in parts):
        return "was learned at the text encoders' output, which is not read here"
    if parts.keys() != set(PARTS):
        return f"is not for SDXL, which needs {PARTS[0]} and {PARTS[1]} and nothing else"
    if not widths:
        return "cannot be held against this model, which has not both text encoders"
    infos = [tensors[parts[part]] for part in PARTS]
    if not all(info.dtype.startswith(("F", "BF")) for info in infos):
        return "holds whole numbers, not fractions"
    return misfit([info.shape for info in infos], widths)


def _read(word: str, parts: Mapping[str, str], read: Callable[[str], Tensor]) -> Bundle:
    # Copies: what safetensors returns is the file's own pages, which change if it is written over.
    read_ones = (read(parts[part]).to(torch.float32, copy=True) for part in PARTS)
    vectors = tuple(rows.reshape(-1, rows.shape[-1]) for rows in read_ones)
    if not all(bool(torch.isfinite(rows).all()) for rows in vectors):
        return _unused(word, parts, "holds numbers that are not finite")
    return Bundle(word, tuple(parts.values()), vectors)


def _unused(word: str, parts: Mapping[str, str], problem: str) -> Bundle:
    return Bundle(word, tuple(parts.values()), problem=problem)
