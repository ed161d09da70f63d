"""Attention on a CPU in bfloat16 by a kernel of our own (``attention.cpp``), compiled where it runs.

Knows tensors, a C++ compiler, and torch's own attention as the way for everything else. Knows no networks.

torch has no attention on CPUs that multiplies bfloat16 by the processor's own instructions and keeps scores in its
cache: plain products do the first (``blocked``) and write every score down in between. Measured in
``benchmarks/LOG.md``.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from impasto.models import blocked
from impasto.models.traced import is_traced

log = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).with_name("attention.cpp")
COMPILERS: Final = ("c++", "g++", "clang++")
FLAGS: Final = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
SECONDS: Final = 60.0  # that compiling may take; it takes two
WIDTHS: Final = (32, 64)  # of heads


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what ``blocked.attend`` does, with its shapes, by the kernel where that can be had.

    Rows and heads are computed each by itself, whatever the number of threads.
    """
    if is_traced():
        operated: Tensor = _operator(query, key, value)
        return operated
    return _attend(query, key, value)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    call = kernel()
    if call is None or not suits(query, key, value):
        return blocked.attend(query, key, value)
    rows, heads, length, width = query.shape
    output = blocked.room(query)
    tensors = (query, key, value, output)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    sizes = (rows, heads, length, key.shape[2], width)
    failed = call(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        (ctypes.c_int64 * len(strides))(*strides),
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_float(width**-0.5 * math.log2(math.e)),
        ctypes.c_int64(torch.get_num_threads()),
        ctypes.c_void_p(teams()),
    )
    assert not failed, "the kernel was asked for what it cannot do"
    return output


def attend_compiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``attend`` for a network that is compiled whole: written out where blocks are few, else by the kernel."""
    if blocked.few(query, key) or not blocked.suits(query):
        return blocked.attend_compiled(query, key, value)
    operated: Tensor = _operator(query, key, value)
    return operated


@torch.library.custom_op("impasto::attend", mutates_args=())
def _operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _attend(query, key, value).transpose(1, 2).contiguous().transpose(1, 2)


_operator.register_fake(blocked.room)


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is for such tensors."""
    every = (query, key, value)
    return (
        blocked.suits(query)
        and query.shape[-1] in WIDTHS
        and key.shape == value.shape
        and key.shape[:2] == query.shape[:2]
        and key.shape[2] > 0
        and all(tensor.dtype == query.dtype and tensor.stride(-1) == 1 for tensor in every)
    )


@cache
def kernel() -> Callable[..., Any] | None:
    """Return the compiled kernel, or none, and then the log says why."""
    try:
        return _compile()
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        log.warning("native_attention is off: %s", str(error).splitlines()[0])
        return None


@cache
def teams() -> int | None:
    """Return where the OpenMP library that torch divides its operations by begins a team, or none.

    Its threads wait for the next operation by spinning; threads of the kernel's own would share the cores with them.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _compile() -> Callable[..., Any]:
    """Compile the kernel for this processor and load it; nothing is left on the disk.

    Raises:
        LookupError: The processor lacks the instructions, or there is no compiler.
        OSError, subprocess.SubprocessError: Compiling or loading failed.
    """
    if platform.system() != "Linux" or not can_multiply():
        raise LookupError("it needs Linux and a processor with AVX-512 for bfloat16")
    named = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if named is None:
        raise LookupError("it needs a C++ compiler: install g++ or clang, or name yours in CXX")
    with tempfile.TemporaryDirectory(prefix="impasto-") as folder:
        made = Path(folder) / "attention.so"
        command = [named, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        found: Callable[..., Any] = ctypes.CDLL(str(made)).attention_bf16
    return found


def can_multiply() -> bool:
    """Whether the processor multiplies pairs of bfloat16 numbers."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
