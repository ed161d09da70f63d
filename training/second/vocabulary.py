"""From captions to token ids in a compact vocabulary, without a tokenizer at hand.

Knows which of CLIP's ids a caption can produce and each known word's ids (CLIP splits at spaces and commas, so words
can be looked up one by one). The table is made once where the tokenizer's files are, and travels as a small file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from training import words
from training.architecture import BOS, EOS
from training.captions import FILLERS
from training.second.captions import MORE_FILLERS, every_word
from training.second.places import SECOND

TABLE = SECOND / "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """The used ids of CLIP's vocabulary in order (a row of the embedding each) and each word's rows."""

    used: tuple[int, ...]
    rows: dict[str, tuple[int, ...]]

    @property
    def marks(self) -> tuple[int, int, int]:
        """The rows of the start mark, the end mark and ``!``."""
        return self.used.index(BOS), self.used.index(EOS), self.used.index(0)

    @property
    def filler_rows(self) -> tuple[int, ...]:
        """Rows of words that change nothing: what an unknown word is taken for."""
        return tuple(sorted({row for text in (*FILLERS, *MORE_FILLERS) for w in text.split() for row in self.rows[w]}))

    def rows_of(self, text: str) -> list[int]:
        """The rows of a text's words, one after the other."""
        return [row for word in spelled(text) for row in self.rows[word]]

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Padded rows (texts, length) for the first and the second encoder; what is too long is cut."""
        bos, eos, mark = self.marks
        first, second = torch.full((len(texts), length), eos), torch.full((len(texts), length), mark)
        for at, text in enumerate(texts):
            ids = torch.tensor([bos, *self.rows_of(text)[: length - 2], eos])
            first[at, : len(ids)] = second[at, : len(ids)] = ids
        return first, second


def spelled(text: str) -> list[str]:
    """The words of a caption, commas apart."""
    return text.replace(",", " , ").split()


def build() -> Vocabulary:
    """The table, from CLIP's own tokenizer."""
    known = sorted({word for text in every_word() for word in spelled(text.replace("{}", " "))} | {","})
    ids = {word: words.ids_of(word) for word in known}
    used = tuple(sorted({0, BOS, EOS} | {i for found in ids.values() for i in found}))
    place = {full: row for row, full in enumerate(used)}
    return Vocabulary(used, {word: tuple(place[i] for i in found) for word, found in ids.items()})


@cache
def vocabulary() -> Vocabulary:
    """The table, from its file where it is there."""
    if not TABLE.exists():
        made = build()
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        beside = TABLE.with_suffix(".fresh")
        beside.write_text(json.dumps({"used": made.used, "rows": made.rows}))
        beside.replace(TABLE)
    state = json.loads(TABLE.read_text())
    return Vocabulary(tuple(state["used"]), {word: tuple(rows) for word, rows in state["rows"].items()})
