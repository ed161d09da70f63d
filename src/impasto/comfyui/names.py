"""ComfyUI's names of SDXL's parameters, and ours: the same weights in the same shapes under two names.

Knows how ComfyUI names what its loaders give. Knows no LoRAs and no tensors, and imports nothing of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, cast

from impasto.lora.keys import FIRST, SECOND, Parameter, Target

Shape = tuple[int, ...]
Kind = Literal["model", "clip"]  # ComfyUI's two halves of a checkpoint, each with its own patches

UNET_PREFIX: Final = "diffusion_model."
CLIP_PREFIXES: Final = {"clip_l.transformer.": FIRST, "clip_g.transformer.": SECOND}
_OLD_NAME: Final = "class_embedding."  # the label embedding's other name among ComfyUI's names, which SDXL has not
# Tables, which LoRAs do not patch; and a matrix that ComfyUI gives the first encoder, whose answer SDXL does not use.
_NOT_PATCHED: Final = (
    ".token_embedding.weight",
    ".position_embedding.weight",
    "clip_l.transformer.text_projection.weight",
)


@dataclass(frozen=True, slots=True)
class Names:
    """A model's parameters by our names.

    Attributes:
        shapes: Of each parameter.
        keys: ComfyUI's name of each parameter, and in which half it is.
    """

    shapes: dict[Target, Shape] = field(default_factory=dict)
    keys: dict[Target, tuple[Kind, str]] = field(default_factory=dict)

    def add(self, target: Target, kind: Kind, key: str, shape: Shape) -> None:
        """Take a parameter in."""
        self.shapes[target] = shape
        self.keys[target] = kind, key


def read_names(
    unet: Mapping[str, Shape], diffusers: Mapping[str, str], clip: Mapping[str, Shape], network: str = "unet"
) -> Names:
    """Name the parameters of a MODEL and a CLIP.

    Args:
        unet: Shape by name in the state dict of ``MODEL.model``.
        diffusers: diffusers' names of the UNet's parameters to ComfyUI's, as ``comfy.utils.unet_to_diffusers`` tells.
        clip: Shape by name in the state dict of ``CLIP.cond_stage_model``; empty where none is connected.
        network: What the UNet is to a LoRA: ``unet``, or ``refiner``.
    """
    names = Names()
    for ours, theirs in diffusers.items():
        key = UNET_PREFIX + theirs
        if key in unet and not ours.startswith(_OLD_NAME):
            names.add(_target(network, ours), "model", key, unet[key])
    for key, shape in clip.items():
        for prefix, encoder in CLIP_PREFIXES.items():
            name = key.removeprefix(prefix)
            if name != key and name.endswith((".weight", ".bias")) and not key.endswith(_NOT_PATCHED):
                names.add(_target(encoder, name), "clip", key, shape)
    return names


def _target(network: str, name: str) -> Target:
    module, _, parameter = name.rpartition(".")
    return Target(network, module, cast(Parameter, parameter))
