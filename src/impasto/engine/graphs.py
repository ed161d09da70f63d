"""CUDA graphs: a network call recorded once per input shape and replayed with one launch.

Knows tensors and CUDA. Knows no model. The weights are recorded by address: editing them in place (a LoRA goes on or
off) needs no new recording, moving them does (``forget``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

log = logging.getLogger(__name__)

SHAPES = 8  # recordings kept; each holds its own inputs, and all share one memory pool
WARM_UPS = 3  # calls before recording, so that libraries have chosen their algorithms


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any

    def replay(self, inputs: list[Tensor]) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.output)  # the next replay overwrites it


class Graphed:
    """Calls ``network`` through CUDA graphs; without CUDA it is called as it is.

    Args:
        network: Takes tensors and plain values, also in dicts and tuples, and returns tensors likewise. What it does
            must depend on nothing but its inputs and memory that stays in place.
        most: Input shapes whose recordings are kept; the least recently used goes first.
    """

    def __init__(self, network: Callable[..., Any], most: int = SHAPES) -> None:
        self.network = network
        self._most = most
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._pool: Any = None
        self.recorded = 0  # recordings made so far

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network; the inputs are copied, and the outputs are the caller's to keep."""
        leaves, form = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not all(tensor.is_cuda for tensor in tensors):
            return self.network(*args, **kwargs)
        key = (str(form), *(_shape(leaf) for leaf in leaves))
        if key not in self._recordings:
            self._recordings[key] = self._record(leaves, form)
            while len(self._recordings) > self._most:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return self._recordings[key].replay(tensors)

    def forget(self) -> None:
        """Drop all recordings, as is needed after weights were moved."""
        self._recordings.clear()
        self._pool = None

    def _record(self, leaves: list[Any], form: TreeSpec) -> _Recording:
        with torch.inference_mode(False):  # so that later calls may fill them in any mode
            held = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(held, form)
        with torch.no_grad():
            self._warm_up(args, kwargs)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                output = self.network(*args, **kwargs)
        self.recorded += 1
        log.debug("recorded CUDA graph %d", self.recorded)
        return _Recording(graph, [leaf for leaf in held if isinstance(leaf, Tensor)], output)

    def _warm_up(self, args: Any, kwargs: Any) -> None:
        """Run on a stream of its own, as recording asks for."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.network(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)


def _shape(leaf: Any) -> Hashable:
    """What must agree for a recording to fit: a tensor's form, or the value itself."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
