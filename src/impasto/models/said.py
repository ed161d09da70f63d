"""What cross-attention makes of the prompts, kept from step to step: it does not change while they do not.

Knows tensors. Knows no attention, LoRA or steps. Keys and values of the last call's prompts are kept; a call with
other prompts, or weights that were edited since, makes them anew. Each thread has its own last call: threads may run
different rows at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Said(threading.local):
    """The prompts of the call that is running, and whether they are those of the call before."""

    def __init__(self) -> None:
        self._running: Tensor | None = None
        self._seen: Tensor | None = None  # a copy: the caller's may be filled anew
        self.stamp = 0  # counts changes

    def begin(self, tokens: Tensor) -> None:
        """Note a call's prompts ``[N, T, D]``."""
        if self._seen is None or self._seen.dtype != tokens.dtype or not torch.equal(self._seen, tokens):
            self._seen = tokens.clone()
            self.stamp += 1
        self._running = tokens

    def end(self) -> None:
        """Note that the call is over."""
        self._running = None

    def heard(self, tokens: Tensor) -> bool:
        """Whether these are the running call's prompts, so that ``stamp`` is theirs."""
        return tokens is self._running

    def listen(self, unet: nn.Module) -> None:
        """Be told of a UNet's calls; those that go past its hooks are computed plainly."""

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            tokens = kwargs.get("encoder_hidden_states")
            if isinstance(tokens, Tensor) and tokens.device.type == "cpu":
                self.begin(tokens)

        unet.register_forward_pre_hook(before, with_kwargs=True)
        unet.register_forward_hook(lambda *_: self.end(), always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Said:
        copy = memo[id(self)] = Said()
        return copy


class Kept(threading.local):
    """One layer's answer to the prompts.

    Args:
        said: Tells whether the prompts are those of before.
    """

    def __init__(self, said: Said) -> None:
        self._said = said
        self._answer: Tensor | None = None
        self._to: tuple[int, ...] = ()

    def answer(self, tokens: Tensor, parts: tuple[Tensor, ...], ask: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``ask(tokens)``, from memory where prompts and weights are as they were.

        Args:
            tokens: ``[N, T, D]``.
            parts: The layer's weights.
            ask: Computes the answer.
        """
        if not self._said.heard(tokens) or any(part.is_inference() for part in parts):
            return ask(tokens)
        to = (self._said.stamp, *(value for part in parts for value in (part._version, part.data_ptr())))
        if self._answer is None or to != self._to:
            self._answer, self._to = ask(tokens), to
        return self._answer

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept(deepcopy(self._said, memo))
