"""The fields and outputs that both SDXL nodes have in common, stated once from our limits; and the LoRA stack's type.

Knows ComfyUI's V3 schema, so it can be imported inside ComfyUI alone. What becomes of the values is ``request``'s.
"""

from __future__ import annotations

from typing import Any, Final

from comfy_api.latest import io  # type: ignore[import-not-found]

from impasto.types import ACCELERATIONS, LIMITS, REFINE_MODES, SCHEDULERS, Bounds

CATEGORY: Final = "Impasto"
LoraStack = io.Custom("LORA_STACK")  # as other packs have it: a list of (name, model strength, CLIP strength)


def shared_inputs() -> list[Any]:
    """Return the inputs of both nodes, in the order that they are shown."""
    return [
        io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What the picture shows."),
        io.String.Input(
            "negative_prompt", multiline=True, default="", dynamic_prompts=True, tooltip="What it should not show."
        ),
        _whole("width", LIMITS.side, "In pixels.", step=LIMITS.side_multiple),
        _whole("height", LIMITS.side, "In pixels.", step=LIMITS.side_multiple),
        _whole("num_inference_steps", LIMITS.num_inference_steps, "Denoising steps."),
        _number("guidance_scale", LIMITS.guidance_scale, 0.1, "How closely to follow the prompt; 0 and 1 do not."),
        _whole("num_images", LIMITS.num_images, "Pictures; the next one's seed is one higher."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,  # ComfyUI draws random seeds itself, so that the workflow has them
            max=int(LIMITS.seed.high),
            control_after_generate=True,
            tooltip="The same seed and fields give the same picture.",
        ),
        io.Combo.Input("scheduler", options=list(SCHEDULERS), default=SCHEDULERS[0], tooltip="The sampler."),
        _number("strength", LIMITS.strength, 0.01, "How far to go from the start picture, if one is connected."),
        io.Combo.Input(
            "refine", options=list(REFINE_MODES), default=REFINE_MODES[0], tooltip="Whether a refiner takes part."
        ),
        io.Boolean.Input(
            "enable_safety_checker", default=True, tooltip="Check finished pictures; a flagged one comes out black."
        ),
        io.Image.Input("image", optional=True, tooltip="Start picture, scaled and cropped to width and height."),
        io.Mask.Input(
            "mask", optional=True, tooltip="White is painted, the rest of the start picture kept. Empty: no mask."
        ),
        LoraStack.Input("lora_stack", optional=True, tooltip=f"Up to {LIMITS.max_loras} LoRAs, applied in order."),
    ]


def acceleration_input() -> Any:
    """Return the last input of both nodes: optional, and behind the others, so that older workflows stay right."""
    return io.Combo.Input(
        "acceleration",
        options=list(ACCELERATIONS),
        default=ACCELERATIONS[0],
        optional=True,
        tooltip="Exactness given for speed: balanced takes about half the time, fast two fifths.",
    )


def shared_outputs() -> list[Any]:
    """Return the outputs of both nodes."""
    return [
        io.Image.Output("images", display_name="images"),
        io.Boolean.Output("nsfw", display_name="nsfw", is_output_list=True, tooltip="Whether each was flagged."),
        io.Int.Output("first_seed", display_name="seed", tooltip="Of the first picture."),
        io.String.Output("report", display_name="report", tooltip="What each LoRA did, module by module."),
    ]


def _whole(name: str, bounds: Bounds, tooltip: str, step: int = 1) -> Any:
    ends = {"default": int(bounds.default), "min": int(bounds.low), "max": int(bounds.high)}
    return io.Int.Input(name, step=step, tooltip=tooltip, **ends)


def _number(name: str, bounds: Bounds, step: float, tooltip: str) -> Any:
    ends = {"default": float(bounds.default), "min": float(bounds.low), "max": float(bounds.high)}
    return io.Float.Input(name, step=step, tooltip=tooltip, **ends)
