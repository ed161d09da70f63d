"""Calls of a network written down as a list of operations, once for each shape, and run without Python.

Knows tensors and TorchScript. Knows no networks.

Threads that compute rows side by side (``spread``) meet at Python's lock before each of some two thousand operations,
and whoever finds it taken falls asleep. A list of operations is run with the lock open. They are the same operations,
so the bits are the same. Weights are in the list by reference: they may be edited in place, and where they were moved
it is made anew. What is written down must depend on nothing but the inputs and the weights.

Measured in ``benchmarks/LOG.md``. Of ``torch.jit.trace`` this is the half that leaves nothing behind when a list is
dropped: functions traced by it belong to torch for good.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Work = Callable[..., Any]
SHAPES: Final = 8  # lists kept; one of the built-in model's takes 25 MB, mostly about where in Python things came from
CALLS: Final = 3  # of a shape; the last of them is written down, which takes a quarter of a second
MOST_COUNTED: Final = 1024  # shapes that were called less often than that


class Traced:
    """Runs work on tensors, from a list of its operations where there is one. Any thread may call it.

    Args:
        weights: All that the work reads besides its inputs.
        most: Lists kept; the least recently used goes first.
    """

    def __init__(self, weights: Iterable[Tensor], most: int = SHAPES) -> None:
        self._weights = list(weights)
        self._most = most
        self._lists: OrderedDict[Hashable, Work | None] = OrderedDict()  # none: it cannot be written down
        self._calls: Counter[Hashable] = Counter()  # of kinds that have no list
        self._where: tuple[int, ...] = ()  # the weights lay when the lists were made
        self._noting, self._tracing = threading.Lock(), threading.Lock()
        self.written = 0  # lists made so far

    def __call__(self, name: Hashable, work: Work, *inputs: Tensor) -> Any:
        """Return ``work(*inputs)``.

        Args:
            name: Of the work: whatever has the same name and inputs of the same shapes does the same.
            work: Takes the inputs, returns a tensor or a tuple of them.
        """
        key = (name, *((t.shape, t.stride(), t.dtype) for t in inputs))
        run, due = self._note(key)
        if run is not None:
            # Optimised, weights of equal values would be made one, and an edit of one would be an edit of both.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                return run(*inputs)
        if due and self._tracing.acquire(blocking=False):
            try:
                return self._write_down(key, work, inputs)
            finally:
                self._tracing.release()
        return work(*inputs)

    def _note(self, key: Hashable) -> tuple[Work | None, bool]:
        """Return a call's list, if there is one, and whether it is time to make one; forget lists of moved weights."""
        where = tuple(weight.data_ptr() for weight in self._weights)
        with self._noting:
            if where != self._where:
                self._lists.clear()
                self._where = where
            if key in self._lists:
                self._lists.move_to_end(key)
                return self._lists[key], False
            if len(self._calls) >= MOST_COUNTED:
                self._calls.clear()
            self._calls[key] += 1
            return None, self._calls[key] >= CALLS

    def _write_down(self, key: Hashable, work: Work, inputs: tuple[Tensor, ...]) -> Any:
        """Do the work once more through Python, and keep the list of what it did."""
        run: Work | None = None
        try:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values that are taken for constants: here they are
                given = tuple(tensor.clone() for tensor in inputs)
                graph, answer = torch.jit._get_trace_graph(_Called(work), given)  # type: ignore[attr-defined, no-untyped-call]
                run = torch._C._create_function_from_graph("forward", graph)
                self.written += 1
        except (RuntimeError, AttributeError, TypeError) as error:
            log.warning(
                "a call cannot be run as TorchScript: %s", next(iter(str(error).splitlines()), type(error).__name__)
            )
            answer = work(*inputs)
        with self._noting:
            del self._calls[key]
            self._lists[key] = run
            while len(self._lists) > self._most:
                self._lists.popitem(last=False)
        return answer


def is_traced() -> bool:
    """Whether the calling thread's operations are being written down."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


class _Called(nn.Module):
    """Work in the form that torch traces; what it holds stays out of torch's sight, and so constant."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = (work,)

    def forward(self, *inputs: Tensor) -> Any:
        return self._work[0](*inputs)
