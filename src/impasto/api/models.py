"""The table of served models: each id with its fields, defaults and ranges.

Validation, ``/openapi.json`` and ``docs/api.md`` are all made from this table. Knows the names users send. Knows
nothing of checkpoints on disk: which weights answer is the worker's setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from impasto.api.fields import Choice, Field, Flag, Integer, Loras, Number, Picture, Schema, Size, Text
from impasto.types import LIMITS, OUTPUT_FORMATS, REFINE_MODES, SCHEDULER_ALIASES, SCHEDULERS

VERSIONS: Final = ("v2", "v3")  # of the hosted API; they differ in their paths alone
ALIASES: Final = {"prompt_strength": "strength"}  # other spellings of a field; the field's own name wins

_FORM: Final[tuple[Field, ...]] = (
    Text("prompt", "What to draw."),
    Picture("image", "Start picture: a URL, data URI or base64 of a PNG, JPEG or WebP."),
    Picture("mask_image", "Where to paint in `image`: white is painted, black is kept.", mask=True),
    Number(
        "strength",
        "How far from the start picture; without one it is unused. Also `prompt_strength`.",
        LIMITS.strength,
    ),
    Loras("loras", "LoRAs to apply, each `{path, scale}`."),
    Size("size", f"Width*height in pixels, each a multiple of {LIMITS.side_multiple}; also written WxH."),
    Integer("num_inference_steps", "Denoising steps.", LIMITS.num_inference_steps),
    Number("guidance_scale", "How closely the prompt is followed; 0 and 1 switch guidance off.", LIMITS.guidance_scale),
    Integer("num_images", "Pictures to make; picture i uses seed + i.", LIMITS.num_images),
    Integer("seed", "Start of the random numbers; -1 draws one, which is reported back.", LIMITS.seed),
    Flag("enable_base64_output", "Answer with naked base64 in place of URLs."),
    Flag(
        "enable_safety_checker",
        "Taken for compatibility: this version has no checker, and reports false for each picture.",
        default=True,
    ),
    Flag("enable_sync_mode", "Hold the request until the pictures are done."),
    Text("negative_prompt", "What not to draw; absent is not the same as empty."),
    Choice("output_format", "File format of the pictures.", "png", OUTPUT_FORMATS, aliases=(("jpg", "jpeg"),)),
    Choice(
        "scheduler",
        "Sampler; the names of other services (`K_EULER`, `DPMSolverMultistep`, …) are taken too.",
        SCHEDULERS[0],
        SCHEDULERS,
        aliases=tuple(SCHEDULER_ALIASES.items()),
    ),
    Choice(
        "refine",
        "Whether the refiner takes the last steps (also `base_model_refiner`), goes once more over the finished "
        "picture, or nothing; needs a server with a refiner.",
        REFINE_MODES[0],
        REFINE_MODES,
        aliases=(("base_model_refiner", "expert_ensemble_refiner"),),
    ),
    Number(
        "high_noise_frac",
        "Share of the noise schedule that is the base model's (`expert_ensemble_refiner`).",
        LIMITS.high_noise_frac,
    ),
    Integer(
        "refine_steps",
        "Steps of the second pass's schedule, of which the last run (`base_image_refiner`); not given: as the base's.",
        LIMITS.num_inference_steps,
        optional=True,
    ),
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One id that can be posted to, and the form it takes."""

    id: str
    description: str
    fields: tuple[Field, ...]
    required: tuple[str, ...] = ("prompt",)

    def schema(self) -> Schema:
        """Return the JSON Schema of the request body, fields in the order forms show them."""
        return {
            "type": "object",
            "required": list(self.required),
            "properties": {field.name: field.schema() for field in self.fields},
            "x-order-properties": [field.name for field in self.fields],
            "description": "Unknown keys are ignored; null means not given.",
        }


def _changed(form: tuple[Field, ...], *changed: Field) -> tuple[Field, ...]:
    """Return the form with some fields replaced by others of the same name."""
    by_name = {field.name: field for field in changed}
    return tuple(by_name.get(field.name, field) for field in form)


_NO_LORAS: Final = Loras("loras", "This model takes none: post to the model with -lora in its name.", max_items=0)
_STABILITY_FORM: Final = _changed(
    _FORM,
    Integer("num_inference_steps", "Denoising steps.", replace(LIMITS.num_inference_steps, default=28)),
    Number("guidance_scale", "How closely the prompt is followed.", replace(LIMITS.guidance_scale, default=3.5)),
)

MODELS: Final[tuple[ServedModel, ...]] = (
    ServedModel("wavespeed-ai/sdxl-lora", "SDXL with up to five LoRAs.", _FORM),
    ServedModel("wavespeed-ai/sdxl", "SDXL.", _changed(_FORM, _NO_LORAS)),
    ServedModel("stability-ai/sdxl-lora", "SDXL with up to five LoRAs, under its other name.", _STABILITY_FORM),
    ServedModel("stability-ai/sdxl", "SDXL, under its other name.", _changed(_STABILITY_FORM, _NO_LORAS)),
)
