"""Attention on a CPU in half precision, by plain products over scores that stay in the processor's cache.

Knows tensors, and torch's own attention as the way for everything else. Knows no networks.

torch's attention for CPUs multiplies bfloat16 through float32 registers. Plain matrix products go to oneDNN, which uses
the processor's bfloat16 instructions, so a product, a softmax and a product are faster although the scores are written
down in between, as long as they stay in the cache: over blocks of queries where there are many keys, over all heads at
once where there are few. Measured in ``benchmarks/LOG.md``: 1.5 to 1.9 times as fast; slower in float32.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from impasto.models.traced import is_traced

SCORES: Final = 2**20  # that are held at a time: 2 MB, the second level of a cache and a little of the third
MANY_KEYS: Final = 512  # from here on a block of one head's queries is enough work for a product
MOST_WRITTEN: Final = 8  # blocks of one attention in a compiled graph: each is compiled for itself


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return ``softmax(query key^T / sqrt(D)) value``, the fastest way that is known here.

    Args:
        query: ``[N, heads, L, D]``.
        key: ``[N, heads, S, D]``; value likewise.

    Returns:
        ``[N, heads, L, D]``. Each row is computed by itself, so no row's bits depend on its neighbours.
    """
    if not suits(query):
        return F.scaled_dot_product_attention(query, key, value)
    if key.shape[-2] < MANY_KEYS:
        return by_rows(query, key, value)
    blocks: Tensor = (_operator if is_traced() else in_blocks)(query, key, value)
    return blocks


def attend_compiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``attend`` for a network that is compiled whole.

    Its blocks are written out, so that the compiler fuses what lies between the products; where they are many, one
    operator makes them.
    """
    if not suits(query):
        return F.scaled_dot_product_attention(query, key, value)
    if few(query, key):
        return written(query, key, value)
    operated: Tensor = _operator(query, key, value)
    return operated


def few(query: Tensor, key: Tensor) -> bool:
    """Whether there are few enough blocks to be written out in a compiled graph."""
    return query[..., 0].numel() * key.shape[-2] <= MOST_WRITTEN * SCORES


def written(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Product, softmax and product, divided by rows and then by queries until the scores fit."""
    scores = query[..., 0].numel() * key.shape[-2]
    if scores > SCORES and len(query) > 1:
        every = zip(torch.split(query, 1), torch.split(key, 1), torch.split(value, 1), strict=True)
        return torch.cat([written(*row) for row in every])
    if scores > SCORES:
        block = max(1, SCORES // (query.shape[1] * key.shape[-2]))
        return torch.cat([written(some, key, value) for some in torch.split(query, block, 2)], 2)
    return torch.softmax(query * query.shape[-1] ** -0.5 @ key.mT, -1) @ value


@torch.library.custom_op("impasto::attend_in_blocks", mutates_args=())
def _operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return in_blocks(query, key, value)


def room(query: Tensor, *_: Tensor) -> Tensor:
    """Memory for an answer: heads lie side by side in each token."""
    rows, heads, length, width = query.shape
    return query.new_empty(rows, length, heads, width).transpose(1, 2)


_operator.register_fake(room)


def suits(query: Tensor) -> bool:
    """Whether plain products are the faster way."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend head by head, with as many queries at a time as ``SCORES`` are for; shapes as ``attend``'s."""
    rows, heads, length, width = query.shape
    scaled = query * width**-0.5
    output = room(query)
    block = max(1, SCORES // key.shape[-2])
    held = query.new_empty(min(block, length), key.shape[-2])
    for row in range(rows):
        for head in range(heads):
            keys, values = key[row, head].T.contiguous(), value[row, head].contiguous()
            for start in range(0, length, block):
                some = scaled[row, head, start : start + block]
                scores = torch.mm(some, keys, out=held[: len(some)])
                shares = torch.softmax(scores, -1, out=scores)  # in place: half of the cache
                output[row, head, start : start + block] = torch.mm(shares, values)
    return output


def by_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend row by row, all heads at once; shapes as ``attend``'s."""
    scaled = query * query.shape[-1] ** -0.5
    every = zip(scaled, key, value, strict=True)
    return torch.stack([torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v) for q, k, v in every])
