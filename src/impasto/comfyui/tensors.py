"""ComfyUI's pictures and ours: tensors with numbers from 0 to 1, and PIL images.

Knows the layouts of ComfyUI's IMAGE (``[B, H, W, C]`` float32) and MASK (``[B, H, W]``, 1 is painted). Knows no nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from impasto.errors import InvalidInput


def one_picture(field: str, images: Tensor) -> Image.Image:
    """Return the picture of an IMAGE ``[1, H, W, 3 or 4]``; a lone picture may lack the first axis.

    Raises:
        InvalidInput: It is a batch of several, which one request cannot start from.
    """
    single = _single(field, images, 4)
    if single.shape[-1] not in (3, 4):
        raise InvalidInput(field, f"has {single.shape[-1]} channels; connect a picture with 3, or 4 with transparency")
    return Image.fromarray(_bytes(single))


def mask_picture(field: str, masks: Tensor) -> Image.Image | None:
    """Return a MASK ``[1, H, W]`` as a grey picture, white where it is painted; ``None`` where nothing is.

    ComfyUI's own loader gives a black mask with every picture that has none.

    Raises:
        InvalidInput: It is a batch of several.
    """
    single = _single(field, masks, 3)
    return Image.fromarray(_bytes(single)) if bool((single > 0).any()) else None


def image_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures of one size as an IMAGE: ``[B, H, W, 3]``, float32, 0 to 1, on the CPU."""
    return torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures]).float() / 255


def _single(field: str, tensor: Tensor, axes: int) -> Tensor:
    batch = tensor[None] if tensor.ndim == axes - 1 else tensor
    if batch.ndim != axes or len(batch) != 1:
        raise InvalidInput(field, f"has the shape {list(tensor.shape)}; connect one picture (take one of the batch)")
    return batch[0]


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = (tensor.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return scaled
