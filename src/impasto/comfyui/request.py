"""The values of an SDXL node's fields as a request of ours.

Knows the fields that ``schema`` states, ComfyUI's pictures, and ``GenerationRequest``. Knows no server and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from impasto.comfyui.tensors import mask_picture, one_picture
from impasto.types import ACCELERATIONS, GenerationRequest, LoraRef


def read_request(values: Mapping[str, Any], loras: Sequence[LoraRef]) -> GenerationRequest:
    """Make a request of the shared inputs' values, with LoRAs as whoever runs it names them.

    An empty negative prompt is none at all, which to SDXL is not the same as an empty text.

    Raises:
        InvalidInput: A value is out of range, or several start pictures are connected.
    """
    image, mask = values.get("image"), values.get("mask")
    start = None if image is None else one_picture("image", image)
    names = ("width", "height", "num_inference_steps", "guidance_scale", "num_images", "seed", "scheduler", "strength")
    return GenerationRequest(
        prompt=values["prompt"],
        negative_prompt=values["negative_prompt"] or None,
        refine=values["refine"],
        acceleration=values.get("acceleration", ACCELERATIONS[0]),  # workflows of before have none
        image=start,
        mask_image=None if mask is None else mask_picture("mask", mask),
        loras=tuple(loras),
        **{name: values[name] for name in names},
    )
