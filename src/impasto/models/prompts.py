"""Prompts as text: the weighted syntax, and where a word that stands for an embedding occurs.

Knows strings alone. Knows no tokenizers, tensors or files, and imports no torch.

The syntax: ``(word)`` weighs 1.1, ``(word:1.3)`` as it says, ``[word]`` 1/1.1; brackets in brackets multiply. A bracket
after a backslash is text, and so is one without its partner. ``BREAK`` starts a new part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from impasto.errors import InvalidInput
from impasto.types import PromptSyntax

BRACKET_WEIGHT = 1.1  # of (word); that of [word] is its inverse
MAX_WEIGHT = 10.0  # either side of zero
EMBEDDING_PREFIX = "embedding:"  # ComfyUI's way to mark the name of an embedding

Piece = tuple[str, float]  # text and its weight
Chunk = tuple[Piece, ...]  # what stands between two BREAKs

_SYMBOL = re.compile(r"\\[()\[\]]|[()\[\]]|\bBREAK\b")
_NUMBER = re.compile(
    r"\s*[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf|infinity)\s*", re.IGNORECASE
)
_PARTNER = {")": "(", "]": "["}


def parse(text: str) -> tuple[Chunk, ...]:
    """Read a weighted prompt.

    Returns:
        At least one chunk, each with neighbouring pieces of different weights and none empty. Blank chunks are left
        out: two ``BREAK`` in a row are as one.

    Raises:
        InvalidInput: A piece of text weighs more than ``MAX_WEIGHT`` either way, or its weight is not a number.
    """
    factors, ends = _pair(text)
    reading, weights, at = _Reading(), [1.0], 0
    for symbol in _SYMBOL.finditer(text):
        start = symbol.start()
        if symbol[0] == "BREAK":
            reading.add(text[at:start], weights[-1])
            reading.chunks.append([])
        elif symbol[0].startswith("\\"):
            reading.add(text[at:start] + symbol[0][1], weights[-1])
        elif start in factors:
            reading.add(text[at:start], weights[-1])
            weights.append(weights[-1] * factors[start])
        elif start in ends:
            reading.add(text[at : ends[start]], weights.pop())
        else:
            continue
        at = symbol.end()
    reading.add(text[at:], weights[-1])
    return reading.finish()


def chunks_of(text: str, syntax: PromptSyntax) -> tuple[Chunk, ...]:
    """Read a prompt in its syntax: as ``parse``, or as one chunk of one piece."""
    return parse(text) if syntax == "weighted" else (((text, 1.0),),)


def words_in(text: str, syntax: PromptSyntax, words: Collection[str]) -> set[str]:
    """Return those of the words that stand for embeddings in a prompt; all, if it cannot be read."""
    try:
        chunks = chunks_of(text, syntax) if words else ()
    except InvalidInput:
        return set(words)
    return {word for chunk in chunks for piece, _ in chunk for _, word in spot(piece, words) if word is not None}


def spot(text: str, words: Collection[str]) -> tuple[tuple[str, str | None], ...]:
    """Find the words that stand for embeddings, each also with ``embedding:`` before it.

    A word is found where it stands whole: ``cat`` is not in ``cats``. Upper and lower case differ, and of words that
    begin alike the longest is taken.

    Returns:
        The text in order, piece by piece: ``(text, None)``, or ``(text, word)`` for a word found.
    """
    if not words:
        return ((text, None),)
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for found in _any_of(words).finditer(text):
        word = found[0] if found[0] in words else found[0].removeprefix(EMBEDDING_PREFIX)
        pieces += [(text[at : found.start()], None), (found[0], word)]
        at = found.end()
    return tuple(piece for piece in [*pieces, (text[at:], None)] if piece[0])


@dataclass(slots=True)
class _Reading:
    """The chunks read so far; the last one is open."""

    chunks: list[list[Piece]] = field(default_factory=lambda: [[]])

    def add(self, text: str, weight: float) -> None:
        """Add text to the open chunk, to its last piece if that weighs the same."""
        if not text:
            return
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            raise InvalidInput(
                "prompt", f"gives {text[:40]!r} the weight {weight:g}; give one from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            )
        chunk = self.chunks[-1]
        if chunk and chunk[-1][1] == weight:
            text = chunk.pop()[0] + text
        chunk.append((text, weight))

    def finish(self) -> tuple[Chunk, ...]:
        """Return the chunks that say something, or one that says nothing."""
        said = [chunk for chunk in self.chunks if any(text.strip() for text, _ in chunk)]
        return tuple(tuple(chunk) for chunk in said or self.chunks[:1])


def _pair(text: str) -> tuple[dict[int, float], dict[int, int]]:
    """Match the brackets.

    A closing bracket belongs to the nearest open one of its kind; open ones of the other kind in between are text.

    Returns:
        The factor of each opening bracket, and for each closing one where the text before it ends; by position.
    """
    factors: dict[int, float] = {}
    ends: dict[int, int] = {}
    open_brackets: list[int] = []
    waiting = {"(": 0, "[": 0}  # so that a bracket without a partner is not searched for
    previous = 0  # end of the symbol before
    for symbol in _SYMBOL.finditer(text):
        bracket, start = symbol[0], symbol.start()
        if bracket in waiting:
            waiting[bracket] += 1
            open_brackets.append(start)
        elif waiting.get(_PARTNER.get(bracket, ""), 0):
            opener = _nearest(text, _PARTNER[bracket], open_brackets, waiting)
            factors[opener], ends[start] = _factor(text, bracket, previous, start)
        previous = symbol.end()
    return factors, ends


def _nearest(text: str, kind: str, open_brackets: list[int], waiting: dict[str, int]) -> int:
    """Close the nearest open bracket of a kind, and those above it; return its position."""
    while True:
        opener = open_brackets.pop()
        waiting[text[opener]] -= 1
        if text[opener] == kind:
            return opener


def _factor(text: str, bracket: str, start: int, closer: int) -> tuple[float, int]:
    """Return the factor of a pair of brackets, and where the text ends that it holds from ``start``."""
    if bracket == "]":
        return 1 / BRACKET_WEIGHT, closer
    colon = text.rfind(":", start, closer)
    if colon >= 0 and _NUMBER.fullmatch(text, colon + 1, closer):
        return float(text[colon + 1 : closer]), colon
    return BRACKET_WEIGHT, closer


def _any_of(words: Collection[str]) -> re.Pattern[str]:
    """Match any of the words where it stands whole; a word that begins or ends with a symbol needs no border there."""
    patterns = []
    for word in sorted(words, key=len, reverse=True):
        before = r"(?<!\w)" if re.match(r"\w", word) else ""
        after = r"(?!\w)" if re.search(r"\w$", word) else ""
        patterns.append(rf"(?:(?<!\w){EMBEDDING_PREFIX}|{before}){re.escape(word)}{after}")
    return re.compile("|".join(patterns))
