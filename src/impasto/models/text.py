"""Text encoders at work: a prompt becomes the hidden states that the UNet reads.

Knows tokenizers, windows, weights, and the vectors that stand for words. Knows no files but embeddings, and nothing of
what is drawn from the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from impasto.errors import InvalidInput
from impasto.models.inversion import WordEmbedding, read_embedding
from impasto.models.prompts import Chunk, chunks_of, spot
from impasto.types import PromptSyntax

MAX_WINDOWS = 20  # of a prompt; 1,500 tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and how to read it; two that are equal have the same embedding."""

    text: str
    syntax: PromptSyntax = "plain"
    embeddings: tuple[WordEmbedding, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A stretch of text of one weight, or a word that stands for an embedding."""

    text: str
    weight: float
    embedding: WordEmbedding | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What is never cut in two: a token, or all vectors of an embedding in the place of so many tokens."""

    id: int
    weight: float
    vectors: Tensor | None = None  # [n, width]

    def __len__(self) -> int:
        return 1 if self.vectors is None else len(self.vectors)


Window = list[Unit]  # no longer than an encoder's room


class TextEncoders:
    """SDXL's text encoders side by side: both of a base model, or a refiner's one.

    Args:
        encoders: CLIP text models; the last one has the projection.
        tokenizers: One for each.
    """

    def __init__(self, encoders: tuple[Any, ...], tokenizers: tuple[Any, ...]) -> None:
        self._encoders = tuple(Encoder(*pair) for pair in zip(encoders, tokenizers, strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each encoder's states."""
        return tuple(encoder.network.config.hidden_size for encoder in self._encoders)

    @torch.no_grad()
    def encode(self, prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embed one prompt.

        A prompt longer than the encoders' window is read in several. A weight w moves the states z of its tokens
        along the line from the empty prompt's: ``z_empty + w * (z - z_empty)``, position by position, in float32;
        the start, end and padding keep theirs. This is ComfyUI's rule. Automatic1111 multiplies the states and then
        restores their mean, which suits the normalised last layer of its first models; SDXL reads the layer before,
        whose mean is ruled by a few very large numbers. The pooled state is not weighted.

        Args:
            prompt: Its embeddings' files are read, and must fit, whether the text has their words or not.
            device: Where the encoders are.

        Returns:
            Tokens ``[77 * windows, D]``, the encoders' penultimate hidden states side by side (768 + 1280 for SDXL),
            and the last encoder's pooled projection of the first window ``[P]``, in the encoders' dtype.

        Raises:
            InvalidInput: The prompt has more than ``MAX_WINDOWS`` windows or too large a weight, or an embedding
                does not fit.

        Source: Podell et al. 2023 (arXiv:2307.01952), section 2.1.
        """
        states = []
        for encoder, windows in zip(self._encoders, self._windows(prompt), strict=True):
            tokens, pooled = encoder.weighted(windows, device)
            states.append(tokens.flatten(0, 1))
        return torch.cat(states, dim=-1), pooled

    def _windows(self, prompt: Prompt) -> tuple[list[Window], ...]:
        """Cut a prompt into windows for each encoder; all have the same number, part by part."""
        vectors = {file: read_embedding(file, self.widths) for file in prompt.embeddings}
        windows: tuple[list[Window], ...] = tuple([] for _ in self._encoders)
        for chunk in chunks_of(prompt.text, prompt.syntax):
            segments = _segments(chunk, prompt.embeddings)
            cut = [
                encoder.windows(segments, {file: found[i] for file, found in vectors.items()})
                for i, encoder in enumerate(self._encoders)
            ]
            most = max(map(len, cut))
            for all_windows, own in zip(windows, cut, strict=True):
                all_windows += own + [[]] * (most - len(own))
        for encoder, cut_up in zip(self._encoders, windows, strict=True):
            _check_length(cut_up, encoder.room)
        return windows


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """One text encoder with its tokenizer."""

    network: Any
    tokenizer: Any

    @property
    def room(self) -> int:
        """Tokens that a window holds beside its start and end; CLIP's: 75."""
        return int(self.tokenizer.model_max_length) - 2

    def windows(self, segments: Sequence[Segment], vectors: Mapping[WordEmbedding, Tensor]) -> list[Window]:
        """Cut segments into windows, at least one; an embedding begins a new one if it does not fit into the rest."""
        windows: list[Window] = [[]]
        left = self.room
        for unit in self._units(segments, vectors):
            if len(unit) > left:
                windows.append([])
                left = self.room
            windows[-1].append(unit)
            left -= len(unit)
        return windows

    def weighted(self, windows: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the penultimate states ``[windows, 77, width]``, weighted, and the first window's pooled ``[P]``."""
        states, pooled = self.run(windows, device)
        weights = torch.ones(states.shape[:2])
        for row, window in enumerate(windows):
            own = torch.tensor([unit.weight for unit in window for _ in range(len(unit))])
            weights[row, 1 : 1 + len(own)] = own
        if bool((weights == 1).all()):
            return states, pooled
        empty, _ = self.run([[]], device)
        return _interpolate(empty, states, weights.to(states.device)), pooled

    def run(self, windows: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the penultimate states ``[windows, 77, width]`` and the first window's pooled projection ``[P]``."""
        ids = torch.tensor([self._ids(window) for window in windows])
        with substituted(self.network.get_input_embeddings(), windows):
            output = self.network(ids.to(device), output_hidden_states=True)
        # Only an encoder with a projection has text_embeds; the first of a base model has none, and needs none.
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return output.hidden_states[-2], pooled[0]

    def _units(self, segments: Sequence[Segment], vectors: Mapping[WordEmbedding, Tensor]) -> Iterator[Unit]:
        placeholder = self._placeholder()
        texts = [segment.text for segment in segments]
        tokens = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
        for segment, ids in zip(segments, tokens, strict=True):
            if segment.embedding is None:
                yield from (Unit(token, segment.weight) for token in ids)
            else:
                for rows in torch.split(vectors[segment.embedding], self.room):
                    yield Unit(placeholder, segment.weight, rows)

    def _placeholder(self) -> int:
        """Return an id to stand where vectors go.

        The pooled state is taken at the end token, which the network finds by its id, or, with a configuration from
        before its id was right (2), as the highest id. The lowest id that means nothing is neither.
        """
        tokenizer = self.tokenizer
        taken = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return next(i for i in range(5) if i not in (*taken, self.network.config.eos_token_id))

    def _ids(self, window: Window) -> list[int]:
        """Return a window's ids with start, end and padding; vectors have the placeholder."""
        ids = [unit.id for unit in window for _ in range(len(unit))]
        tokenizer = self.tokenizer
        padding = [tokenizer.pad_token_id] * (self.room - len(ids))
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]


@contextmanager
def substituted(layer: nn.Module, windows: Sequence[Window]) -> Iterator[None]:
    """Let a token-embedding layer give the windows' vectors in their places, until the block is left."""
    spots: list[tuple[int, int]] = []
    vectors: list[Tensor] = []
    for row, window in enumerate(windows):
        column = 1  # after the start token
        for unit in window:
            if unit.vectors is not None:
                spots += [(row, column + i) for i in range(len(unit))]
                vectors.append(unit.vectors)
            column += len(unit)
    if not spots:
        yield
        return
    rows, columns = map(list, zip(*spots, strict=True))

    def substitute(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[rows, columns] = torch.cat(vectors).to(output)
        return output

    handle = layer.register_forward_hook(substitute)
    try:
        yield
    finally:
        handle.remove()


def _segments(chunk: Chunk, embeddings: Sequence[WordEmbedding]) -> list[Segment]:
    """Divide a chunk where a word stands for an embedding."""
    by_word = {file.token: file for file in embeddings}
    return [
        Segment(text, weight, None if word is None else by_word[word])
        for piece, weight in chunk
        for text, word in spot(piece, by_word.keys())
    ]


def _interpolate(empty: Tensor, states: Tensor, weights: Tensor) -> Tensor:
    """Move each state ``[W, T, D]`` along the line from the empty prompt's ``[1, T, D]``; a weight of 1 is exact."""
    factor, start = weights[..., None], empty.float()
    moved = start + factor * (states.float() - start)
    return torch.where(factor == 1, states.float(), moved).to(states.dtype)


def _check_length(windows: Sequence[Window], room: int) -> None:
    if len(windows) <= MAX_WINDOWS:
        return
    tokens = sum(len(unit) for window in windows for unit in window)
    if tokens > MAX_WINDOWS * room:
        raise InvalidInput("prompt", f"has {tokens} tokens; at most {MAX_WINDOWS * room} are read")
    raise InvalidInput("prompt", f"fills {len(windows)} windows of {room} tokens; at most {MAX_WINDOWS} are read")
