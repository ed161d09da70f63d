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
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Work = Callable[..., Any]
SHAPES: Final = 8  # lists kept; one of the built-in model's takes 25 MB, mostly about where in Python things came from
CALLS: Final = 3  # of a shape; the last of them is written down, which takes a quarter of a second


@dataclass(slots=True)
class _Shape:
    """What is known of one kind of call."""

    calls: int = 0
    run: Callable[..., Any] | None = None


class Traced:
    """Runs work on tensors, from a list of its operations where there is one. Any thread may call it.

    Args:
        weights: All that the work reads besides its inputs.
        most: Kinds of calls whose lists are kept; the least recently used goes first.
    """

    def __init__(self, weights: Iterable[Tensor], most: int = SHAPES) -> None:
        self._weights = list(weights)
        self._most = most
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._where: tuple[int, ...] = ()  # the weights lay when the lists were made
        self._noting, self._tracing = threading.Lock(), threading.Lock()
        self._fails = False
        self.written = 0  # lists made so far

    def __call__(self, name: Hashable, work: Work, *inputs: Tensor) -> Any:
        """Return ``work(*inputs)``.

        Args:
            name: Of the work: whatever has the same name and inputs of the same shapes does the same.
            work: Takes the inputs, returns a tensor or a tuple of them.
        """
        shape = self._note((name, *((t.shape, t.stride(), t.dtype) for t in inputs)))
        if shape.run is not None:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # it would look for more at length
                return shape.run(*inputs)
        if shape.calls >= CALLS and not self._fails and self._tracing.acquire(blocking=False):
            try:
                shape.run = self._write_down(work, inputs)
            finally:
                self._tracing.release()
        return work(*inputs)

    def _note(self, key: Hashable) -> _Shape:
        """Count a call, and forget all lists if the weights are no longer where they were."""
        where = tuple(weight.data_ptr() for weight in self._weights)
        with self._noting:
            if where != self._where:
                self._shapes.clear()
                self._where = where
            shape = self._shapes.setdefault(key, _Shape())
            self._shapes.move_to_end(key)
            shape.calls += 1
            while len(self._shapes) > self._most:
                self._shapes.popitem(last=False)
        return shape

    def _write_down(self, work: Work, inputs: tuple[Tensor, ...]) -> Callable[..., Any] | None:
        """Return the work on such inputs as a function of TorchScript."""
        try:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values that are taken for constants: here they are
                given = tuple(tensor.clone() for tensor in inputs)
                graph = torch.jit._get_trace_graph(_Called(work), given)[0]  # type: ignore[attr-defined, no-untyped-call]
                run: Callable[..., Any] = torch._C._create_function_from_graph("forward", graph)
        except (RuntimeError, AttributeError, TypeError) as error:
            log.warning("torchscript is off: %s", str(error).splitlines()[0])
            self._fails = True
            return None
        self.written += 1
        return run

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        raise TypeError("a copy of a network needs a Traced of its own weights")


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
