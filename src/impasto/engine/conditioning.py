"""What the network is told beside the latents: prompt embeddings, pooled embedding, size ids; and their cache.

Knows prompts and the model's encode function. Knows no latents, noise levels or requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from impasto.errors import InvalidInput
from impasto.models.text import Prompt

CACHE_BYTES = 256 * 2**20  # an SDXL window is 77 x 2048 + 1280 numbers: 0.6 MB in float32


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """One prompt as the two text encoders see it.

    Attributes:
        tokens: Penultimate hidden states of both encoders side by side, ``[T, D]``; 77 for each window of the prompt.
        pooled: Projected pooled state of the second encoder, ``[P]``.
    """

    tokens: Tensor
    pooled: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return self.tokens.nbytes + self.pooled.nbytes

    def widened(self, blank: Embedding, length: int) -> Embedding:
        """Return this embedding followed by as many ``blank`` windows as make ``length`` tokens."""
        missing = length - len(self.tokens)
        if missing == 0:
            return self
        windows = [blank.tokens] * (missing // len(blank.tokens))
        return Embedding(torch.cat([self.tokens, *windows]), self.pooled)

    def last(self, width: int) -> Embedding:
        """Return the part of the second encoder alone, ``width`` numbers a token: what a refiner reads."""
        return Embedding(self.tokens[:, -width:], self.pooled)

    def zeros(self) -> Embedding:
        """The embedding SDXL was trained to read as "no prompt at all"."""
        return Embedding(torch.zeros_like(self.tokens), torch.zeros_like(self.pooled))


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Everything that steers one image in one network; ``negative`` is ``None`` when guidance is off."""

    positive: Embedding
    negative: Embedding | None
    time_ids: Tensor  # [6], of a refiner [5]
    negative_time_ids: Tensor


def size_ids(width: int, height: int) -> Tensor:
    """Return SDXL's micro-conditioning ``[6]``: original size, crop corner, target size, heights before widths.

    Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.3.
    """
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)


def score_ids(width: int, height: int, aesthetic_score: float) -> Tensor:
    """Return the refiner's micro-conditioning ``[5]``: original size, crop corner, aesthetic score (0 to 10)."""
    return torch.tensor([height, width, 0, 0, aesthetic_score], dtype=torch.float32)


class PromptCache:
    """Remembers embeddings by prompt and LoRA set within ``budget`` bytes, least recently used out first."""

    def __init__(self, encode: Callable[[Prompt], Embedding], budget: int = CACHE_BYTES) -> None:
        self._encode = encode
        self._budget = budget
        self._held = 0  # bytes
        self._known: OrderedDict[tuple[Prompt, Hashable], Embedding] = OrderedDict()

    def embed(self, prompt: Prompt, weights: Hashable) -> Embedding:
        """Return the embedding of ``prompt`` under the text-encoder weights that ``weights`` names."""
        key = (prompt, weights)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        found = self._known[key] = self._encode(prompt)
        self._held += found.nbytes
        while self._held > self._budget and len(self._known) > 1:
            self._held -= self._known.popitem(last=False)[1].nbytes
        return found

    def pair(
        self, prompt: Prompt, negative: Prompt | None, weights: Hashable, *, zero_absent: bool
    ) -> tuple[Embedding, Embedding]:
        """Return the embeddings of a prompt and its negative, of the same length.

        An absent negative prompt is zeros where the model says so (``force_zeros_for_empty_prompt``); an empty one
        is the embedding of the empty text. They give different pictures. Of two prompts of different length the
        shorter is filled up with windows of empty text.
        """
        positive = self.embed(prompt, weights)
        if negative is None and zero_absent:
            return positive, positive.zeros()
        try:
            unwanted = self.embed(negative or Prompt(""), weights)
        except InvalidInput as error:  # encoders know no fields but the prompt
            raise InvalidInput(
                "negative_prompt" if error.field == "prompt" else str(error.field), error.problem
            ) from None
        blank = self.embed(Prompt(""), weights)
        length = max(len(positive.tokens), len(unwanted.tokens))
        return positive.widened(blank, length), unwanted.widened(blank, length)
