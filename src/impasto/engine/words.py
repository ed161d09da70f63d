"""Words of a request's prompts that stand for learned vectors: those of its own files, and those that its LoRAs bring.

Knows who goes first where two have the same word. Knows no networks and no tokens.

A LoRA's words are there, with their vectors as they were learned, wherever it acts on how prompts are read at all: its
strength for the text encoders, or its only one, is not 0. There is no half of a word: what stands in its place without
the LoRA is something else, so vectors scaled down would be a word that nobody trained. AUTOMATIC1111's web UI does the
same for ``bundle_emb``, and cog-sdxl for its ``embeddings.pti`` at any ``lora_scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from impasto.lora.apply import LoraFile, LoraSet
from impasto.lora.contents import LoraContents
from impasto.models.inversion import BroughtEmbedding, EmbeddingFile, resolve_embeddings
from impasto.models.prompts import words_in
from impasto.models.text import Prompt
from impasto.types import EmbeddingRef, PromptSyntax

SHOWN = 60  # characters of a word repeated in a note


@dataclass(frozen=True, slots=True)
class Words:
    """The words that a request may use.

    Attributes:
        own: From files that the request names; they must fit whether a prompt has their words or not.
        brought: From its LoRAs, each word once.
        used: Of each LoRA, the words that mean its vectors.
        notes: Of each LoRA, a sentence on every word that does not, although its vectors fit.
    """

    own: tuple[EmbeddingFile, ...]
    brought: tuple[BroughtEmbedding, ...]
    used: tuple[tuple[str, ...], ...]
    notes: tuple[tuple[str, ...], ...]

    def prompt(self, text: str, syntax: PromptSyntax) -> Prompt:
        """Return a prompt with what its words stand for; it keeps hold of no vectors that it has no word for."""
        every = {file.token for file in self.own} | {word.token for word in self.brought}
        there = words_in(text, syntax, every) if self.brought else set()
        return Prompt(text, syntax, (*self.own, *(word for word in self.brought if word.token in there)))


def words_of(own: Sequence[EmbeddingRef], loras: LoraSet, contents: Sequence[LoraContents]) -> Words:
    """Gather the words: the request's own files before its LoRAs, and these in the request's order.

    Args:
        own: As the request names them.
        loras: Its LoRAs.
        contents: What each of them holds.

    Raises:
        InvalidInput: A file of its own is not there, or two of them have the same word.
    """
    files = resolve_embeddings(own)
    taken = {file.token: f"{file.field.rpartition('.')[0]} has that word" for file in files}
    brought: list[BroughtEmbedding] = []
    used: list[tuple[str, ...]] = []
    notes: list[tuple[str, ...]] = []
    for lora, held in zip(loras, contents, strict=True):
        words = {bundle.word: bundle for bundle in held.bundles if not bundle.problem}
        silent = {word: "its scale for the text encoders is 0" for word in words if lora.text_strength == 0}
        lost = {word: taken[word] for word in words if word in taken}
        mine = [bundle for word, bundle in words.items() if word not in silent | lost]
        brought += [BroughtEmbedding(one.word, lora.path, lora.modified, lora.size, one.vectors) for one in mine]
        taken |= {bundle.word: f"{_place(lora)} brings that word, too, and comes first" for bundle in mine}
        used.append(tuple(bundle.word for bundle in mine))
        notes.append(tuple(_note(word, why) for word, why in (lost | silent).items()))
    return Words(files, tuple(brought), tuple(used), tuple(notes))


def _place(lora: LoraFile) -> str:
    return lora.field.removesuffix(".path")


def _note(word: str, why: str) -> str:
    return f"Its embedding for {word[:SHOWN]!r} was not applied: {why}."
