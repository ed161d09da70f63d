"""From text to token ids: CLIP's own byte-pair vocabulary, and the compact one used while training.

The compact vocabulary holds only the ids that captions can produce, so that training carries no idle rows; export
puts the rows back in their places. Does not know captions' meaning or the encoders.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from training.architecture import BOS, EOS, PROMPT_TOKENS
from training.captions import FILLERS, every_word
from training.places import CACHE, PACKAGES

BPE = PACKAGES / "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))]


@cache
def vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary and merge rules, from the published merge list."""
    rules = gzip.decompress(BPE.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = byte_letters()
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(rule.split()) for rule in rules)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, rules


@cache
def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's pair: the same vocabulary, padded with the end mark and with ``!``."""
    folder = CACHE / "bpe"
    write_vocabulary(folder)
    made = []
    for pad in ("<|endoftext|>", "!"):
        made.append(
            CLIPTokenizer(
                vocab=str(folder / "vocab.json"),
                merges=str(folder / "merges.txt"),
                pad_token=pad,
                model_max_length=PROMPT_TOKENS,
            )
        )
    return made[0], made[1]


def write_vocabulary(folder: Path) -> None:
    """The two files that every CLIP tokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, rules = vocabulary()
    files = {
        "vocab.json": json.dumps(tokens, ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "#version: 0.2\n" + "\n".join(rules) + "\n",
    }
    for name, text in files.items():
        beside = folder / f"{name}.{os.getpid()}"
        beside.write_text(text)
        beside.replace(folder / name)


def ids_of(text: str) -> list[int]:
    """The token ids of a text, without marks."""
    return [int(i) for i in tokenizers()[0](text)["input_ids"][1:-1]]


@cache
def used_ids() -> tuple[int, ...]:
    """Every id that training can meet, the pad ``!`` and the two marks among them."""
    met = {0, BOS, EOS}
    for text in every_word():
        met.update(ids_of(text))
        met.update(ids_of(text + ","))
    return tuple(sorted(met))


@cache
def filler_rows() -> tuple[int, ...]:
    """Compact ids of words that change nothing: what an unknown word is taken for."""
    places = {full: compact for compact, full in enumerate(used_ids())}
    return tuple(sorted({places[i] for text in FILLERS for i in ids_of(text)}))


@cache
def tables() -> tuple[dict[int, int], int, int, int]:
    """Full id to compact id, and the compact ids of start, end and ``!``."""
    places = {full: compact for compact, full in enumerate(used_ids())}
    return places, places[BOS], places[EOS], places[0]


@cache
def compact_ids(text: str) -> tuple[int, ...]:
    """A caption in the compact vocabulary, without marks."""
    places = tables()[0]
    return tuple(places[i] for i in ids_of(text))


def encode(texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Padded compact ids for the first and the second encoder."""
    _, bos, eos, mark = tables()
    first = torch.full((len(texts), length), eos)
    second = torch.full((len(texts), length), mark)
    for row, text in enumerate(texts):
        ids = torch.tensor([bos, *compact_ids(text)[: length - 2], eos])
        first[row, : len(ids)] = ids
        second[row, : len(ids)] = ids
    return first, second
