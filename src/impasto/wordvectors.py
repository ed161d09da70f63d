"""Vectors that a word of a prompt stands for (textual inversion): what they can look like.

Knows shapes and formats of numbers. Knows no files, text encoders or prompts, and imports no torch.

Source: Gal et al. 2022 (arXiv:2208.01618).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_VECTORS: Final = 75  # of a word: what a window of the prompt holds
FLOATS: Final = ("F64", "F32", "F16", "BF16")  # formats of their numbers, in safetensors' words


def misfit(shapes: Sequence[tuple[int, ...]], widths: tuple[int, ...]) -> str | None:
    """Say why tensors of these shapes cannot be one word's vectors; ``None``: they can.

    Args:
        shapes: ``[n, width]`` or ``[width]``, one for each text encoder.
        widths: Of the text encoders' token embeddings.
    """
    if any(len(shape) not in (1, 2) or 0 in shape for shape in shapes):
        return f"has tensors of the shapes {list(shapes)} where rows of vectors belong"
    found = tuple(shape[-1] for shape in shapes)
    if found != widths:
        return f"is not for this model: its vectors are {found} wide, the text encoders {widths}"
    counts = [shape[0] if len(shape) == 2 else 1 for shape in shapes]
    if len(set(counts)) > 1:
        return f"has {counts[0]} vectors for the first text encoder and {counts[1]} for the second"
    if counts[0] > MAX_VECTORS:
        return f"has {counts[0]} vectors; a window of the prompt holds {MAX_VECTORS}"
    return None
