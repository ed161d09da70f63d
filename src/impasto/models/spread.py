"""The rows of a network call divided among the threads of a CPU, each of which computes its rows by itself.

Knows tensors and threads. Knows no networks.

Dividing each small operation among threads costs a meeting at the end of each; a network call has thousands, and the
slowest thread is waited for every time. Rows of a batch need nothing of one another, so whole calls can run side by
side and meet once. A guided picture is two rows, so this begins with two cores. What each row gets is the same but for
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

Work = Callable[..., Any]


class Spread:
    """Threads that live as long as this object. It belongs to one thread itself.

    Args:
        threads: Of the CPU, all together.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._workers: list[ThreadPoolExecutor] = []  # of one thread each: a part of a batch always meets its own
        self._each = 0  # threads that a worker's operations are divided among

    def __call__(self, work: Work, *inputs: Tensor) -> Any:
        """Return ``work(*inputs)``.

        Args:
            work: Takes the inputs' rows, some or all, and returns a tensor, or a tuple of them, with as many rows.
            inputs: Each ``[N, ...]``, on the CPU.
        """
        parts = parts_of(len(inputs[0]), self._threads)
        if parts == 1:
            return work(*inputs)
        self._make_ready(parts)
        chunks = zip(*(tensor.chunk(parts) for tensor in inputs), strict=True)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        running: list[Future[Any]] = [
            worker.submit(_in_modes, work, chunk, *modes) for worker, chunk in zip(self._workers, chunks, strict=False)
        ]
        wait(running)  # all: nobody may go on while somebody still reads the weights
        return _joined([future.result() for future in running])

    def _make_ready(self, parts: int) -> None:
        """Have a worker for each part, and let the parts share the threads."""
        each = self._threads // parts
        if len(self._workers) >= parts and self._each == each:
            return
        missing = range(len(self._workers), parts)
        self._workers += [ThreadPoolExecutor(1, f"rows-{number}") for number in missing]
        give_threads(self._workers, each)
        self._each = each

    def __deepcopy__(self, memo: dict[int, Any]) -> Spread:
        return Spread(self._threads)


def parts_of(rows: int, threads: int) -> int:
    """Return into how many equal parts rows are divided: the most that leave each part a thread."""
    return max(parts for parts in range(1, max(1, min(rows, threads)) + 1) if rows % parts == 0)


def give_threads(workers: Iterable[ThreadPoolExecutor], each: int) -> None:
    """Divide the operations of each worker, idle and of one thread, among so many; the caller keeps what it has."""
    mine = torch.get_num_threads()
    wait([worker.submit(_limit, each) for worker in workers])
    _limit(mine)  # what torch told the workers it would tell every new thread


def _limit(threads: int) -> None:
    """Divide operations of the calling thread among so many."""
    torch.get_num_threads()  # a thread's first question sets it to what the last ``set_num_threads`` anywhere said
    torch.set_num_threads(threads)


def _in_modes(work: Work, inputs: tuple[Tensor, ...], inference: bool, grad: bool) -> Any:
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        return work(*inputs)


def _joined(answers: list[Any]) -> Any:
    if isinstance(answers[0], Tensor):
        return torch.cat(answers)
    return tuple(torch.cat(column) for column in zip(*answers, strict=True))
