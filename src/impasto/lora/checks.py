"""What the tensors of an adapter must be before anything is worked out from them: matrices, single numbers, finite.

Knows tensors and how to refuse them. Knows no kinds, names or files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 37.0  # decimal digits of float32's largest number, less a little
_PIECE = 2**20  # numbers that are made larger at a time


class MalformedError(ValueError):
    """The tensors of a module make no sense together; the message says why."""


class WrongSizeError(Exception):
    """The adapter is for a weight of another shape; found before a product of its tensors takes any memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.shape = shape


def matrix(tensor: Tensor) -> Tensor:
    """Return a tensor with its window in its second axis; a vector is a row."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[None]


def check_matrix(part: str, tensor: Tensor) -> None:
    """Refuse a vector and an empty tensor."""
    if tensor.ndim < 2 or 0 in tensor.shape:
        raise MalformedError(f"its {part} has the shape {tuple(tensor.shape)} where a matrix belongs")


def digits(part: str, tensor: Tensor) -> float:
    """Check the numbers; return how many decimal digits a sum over the largest of them can have."""
    if not tensor.is_floating_point():
        raise MalformedError(f"its {part} holds {str(tensor.dtype).removeprefix('torch.')} numbers, not fractions")
    if tensor.numel() == 0:
        raise MalformedError(f"its {part} is empty")
    least, most = _range(tensor)
    largest = max(-least, most)
    if not math.isfinite(least + most):
        raise MalformedError(f"its {part} has numbers that are not finite")
    return math.log10(max(largest * max(tensor.shape, default=1), 1.0))


def _range(tensor: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest number, NaN if one is; float8, of which torch finds neither, by pieces."""
    pieces = [tensor] if tensor.element_size() > 1 else tensor.flatten().chunk(-(-tensor.numel() // _PIECE))
    ends = [torch.aminmax(piece if tensor.element_size() > 1 else piece.float()) for piece in pieces]
    return float(torch.stack([least for least, _ in ends]).min()), float(torch.stack([most for _, most in ends]).max())


def one_number(tensor: Tensor, part: str) -> float:
    """Return the number of a tensor of any shape that holds one."""
    if tensor.numel() != 1:
        raise MalformedError(f"its {part} is not one number")
    value = float(tensor.float())
    if not math.isfinite(value):
        raise MalformedError(f"its {part} is not finite")
    return value
