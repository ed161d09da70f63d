"""Self-attention on a CPU in half precision, in blocks that stay in the processor's cache.

Knows tensors, and torch's own attention as the way for everything else. Knows no networks.

torch's attention for CPUs multiplies bfloat16 through float32 registers. Plain matrix products go to oneDNN, which uses
the processor's bfloat16 instructions, so a product, a softmax and a product over blocks of queries are faster although
the scores are written down in between, as long as a block of them stays in the cache. Measured in
``benchmarks/LOG.md``: 1.3 to 1.9 times as fast from 1,024 tokens on, slower for few keys and in float32.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK: Final = 256  # queries whose scores are held at a time: 2 MB at 4,096 keys in bfloat16
LEAST_KEYS: Final = 512  # with fewer, torch's own way is faster


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return ``softmax(query key^T / sqrt(D)) value``, the fastest way that is known here.

    Args:
        query: ``[N, heads, L, D]``.
        key: ``[N, heads, S, D]``; value likewise.

    Returns:
        ``[N, heads, L, D]``. Each head of each row is computed by itself, so no row's bits depend on its neighbours.
    """
    if suits(query, key):
        return in_blocks(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def suits(query: Tensor, key: Tensor) -> bool:
    """Whether blocks are the faster way."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] >= LEAST_KEYS


def in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend head by head, ``BLOCK`` queries at a time; shapes as ``attend``'s."""
    rows, heads, length, width = query.shape
    scaled = query * width**-0.5
    output = query.new_empty(rows, length, heads, width).transpose(1, 2)
    for row in range(rows):
        for head in range(heads):
            keys, values = key[row, head].T.contiguous(), value[row, head].contiguous()
            for start in range(0, length, BLOCK):
                scores = torch.mm(scaled[row, head, start : start + BLOCK], keys)
                output[row, head, start : start + BLOCK] = torch.mm(torch.softmax(scores, -1), values)
    return output
