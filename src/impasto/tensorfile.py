"""What a file of tensors says about itself before anything is loaded: the safetensors words, and what else it may be.

Knows the safetensors format, and the files that are often saved under its name. Knows no models, no LoRAs, no torch.

Source: the safetensors format, https://huggingface.co/docs/safetensors (8 bytes of length, JSON, data).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

LENGTH: Final = struct.Struct("<Q")  # the first bytes: how long the JSON header is
PROBE: Final = 512  # bytes that tell what a file is instead

# Bytes of one element. Sub-byte and complex types are not here: no LoRA or SDXL checkpoint has them.
DTYPE_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

_PICKLE = "which could run anything; convert it to safetensors, or ask its author for that form"
_PAGE = "an HTML page, such as a login or error page; use the file's own download link, with a token if it needs one"
_AGAIN = "such as an error that a server answered; use the file's own download link, with a token if it needs one"

# How files that are not safetensors begin (after white space, in either case), and the words for them; first fit wins.
_OTHERS: Final = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), words)
    for pattern, words in (
        (
            rb"version https://git-lfs",
            "a Git-LFS pointer, not the file it stands for; fetch the file itself (git lfs pull)",
        ),
        (rb"(<!--.*?-->\s*)?<(!doctype html|html|head|body)", _PAGE),
        (rb"<(\?xml|error)", f"an XML document, {_AGAIN}"),
        (rb"[{\[]", f"JSON text, {_AGAIN}"),
        (
            rb"pk\x03\x04.*\.(safetensors|npy|json|txt|png|jpe?g)",
            "a zip archive; unpack it and give the .safetensors file in it",
        ),
        (rb"pk\x03\x04", f"a pickle in a zip (PyTorch's format), {_PICKLE}"),
        (rb"\x80|\(?c[\w.]+\n[\w.]+\n|\([ld]p?\d*\n", f"a pickle, {_PICKLE}"),
        (rb"gguf", "a GGUF file; give a .safetensors file"),
        (
            rb"\x1f\x8b|7z\xbc\xaf|rar!|\x28\xb5\x2f\xfd|.{257}ustar",
            "a packed archive; unpack it and give the .safetensors file in it",
        ),
        (rb"\x89png|\xff\xd8\xff|riff|gif8", "a picture; give a .safetensors file"),
        (rb"\x89hdf", "an HDF5 file; give a .safetensors file"),
        (rb"\x93numpy", "a NumPy array; give a .safetensors file"),
        (rb"[\t\n\r -~]{4,}\Z", f"plain text, {_AGAIN}"),
    )
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor: dtype in the format's words (``BF16``) and shape."""

    dtype: str
    shape: tuple[int, ...]


def named(start: bytes) -> str:
    """Say what a file that is not safetensors is, and what to do, from its first ``PROBE`` bytes."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((words for begins, words in _OTHERS if begins.match(text)), "not a safetensors file; fetch it again")
