"""Our patches as one of ComfyUI's weight adapters: what a stack of them makes of one weight.

Knows ComfyUI's base class and ``lora.merge``, which does the arithmetic. Knows no files, nodes or names of modules.

ComfyUI calls an adapter wherever it works a weight out: when a model is loaded, at each call of a layer that it keeps
off the device, for merges of models and for saving. Which weight and number format it passes is its own choice, so all
is float32 in here and rounded once, into the format of what it passed. A stack of ours is one adapter, because ComfyUI
rounds between two wherever it passes less than float32.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from comfy.weight_adapter import WeightAdapterBase  # type: ignore[import-not-found]
from torch import Tensor

from impasto.errors import LoraError
from impasto.lora.merge import recipe
from impasto.lora.patch import Patch

Stacked = tuple[tuple[str, Patch, float], ...]  # a LoRA's name, its patch of the weight, and its strength; in order

LARGEST, LARGEST_HALF = torch.finfo(torch.float32).max, torch.finfo(torch.float16).max
ON_ITS_OWN: Final = (1.0, None, None)  # strength of the model's weight, part of it and function, as ComfyUI keeps them


class ExactAdapter(WeightAdapterBase):  # type: ignore[misc]  # ComfyUI has no types
    """What LoRAs make of one weight, in the order of the stack.

    Args:
        loaded_keys: As ComfyUI's own adapters have it; empty.
        weights: The stack, and the largest number that the weight's format has room for. The words are ComfyUI's,
            whose later releases copy an adapter by calling its class with both.
    """

    name = "impasto"

    def __init__(self, loaded_keys: set[str], weights: tuple[Stacked, float]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @torch.no_grad()
    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """Patch ``weight`` in place and return it; ``strength`` multiplies all, which is what ComfyUI's hooks do.

        Raises:
            LoraError: Numbers of the patched weight are not finite.
        """
        stack, largest = self.weights
        made = recipe([(patch, strength * own) for _, patch, own in stack], weight)
        made.write(weight, weight)
        # A float32 weight is on its way into a smaller format; others are rounded already.
        to_be_rounded = weight.dtype == torch.float32 and largest == LARGEST_HALF
        if (made.risky or to_be_rounded) and not bool(weight.abs().max() <= largest):  # a NaN is not
            names = ", ".join(dict.fromkeys(repr(name) for name, _, _ in stack))
            raise LoraError(f"LoRA {names}", f"makes weights that are not finite in {key}; lower its strength")
        return weight


def put_on(patcher: Any, patches: dict[str, tuple[str, Patch]], strength: float) -> None:
    """Put a LoRA's patches on a ModelPatcher, after what is on already.

    Args:
        patcher: A clone of one's own.
        patches: By ComfyUI's name of the weight, with the LoRA's name for errors.
        strength: Of the LoRA.

    Raises:
        RuntimeError: ComfyUI did not take one of them, which a right name cannot cause.
    """
    weights = patcher.model_state_dict()
    adapters = {
        key: ExactAdapter(set(), ((*_taken_off(patcher, key), (name, patch, strength)), _largest(weights[key])))
        for key, (name, patch) in patches.items()
    }
    refused = adapters.keys() - set(patcher.add_patches(adapters))
    if refused:
        raise RuntimeError(f"ComfyUI has no weights {sorted(refused)[:3]}: its names have changed")


def _taken_off(patcher: Any, key: str) -> Stacked:
    """Take the last patch of a weight off, if it is ours, to be put on again in one with the next."""
    patches: list[Any] = patcher.patches.get(key, [])
    match patches[-1:]:
        case [(1.0, ExactAdapter() as last, *rest)] if tuple(rest) == ON_ITS_OWN:
            patches.pop()
            return last.weights[0]
        case _:
            return ()


def _largest(weight: Tensor) -> float:
    """The largest number that a weight can be rounded to; formats of 8 bits are ComfyUI's to scale and to cut."""
    return LARGEST_HALF if weight.dtype == torch.float16 else LARGEST
