"""The table of served models: each id with its fields, defaults and ranges.

Validation, ``GET /api/v3/models``, ``/openapi.json`` and ``docs/api.md`` are all made from this table. Knows the names
users send. Knows nothing of checkpoints on disk: which weights answer is the worker's setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from impasto.api.fields import Choice, Field, Flag, Integer, Loras, Number, Picture, Schema, Size, Text
from impasto.types import (
    ACCELERATIONS,
    LIMITS,
    MOTIONS,
    OUTPUT_FORMATS,
    REFINE_MODES,
    SCHEDULER_ALIASES,
    SCHEDULERS,
    VIDEO_FORMATS,
    Bounds,
)

VERSIONS: Final = ("v2", "v3")  # of the hosted API; they differ in their paths alone
# Other spellings of a field; the field's own name wins.
ALIASES: Final = {"prompt_strength": "strength", "mask": "mask_image"}


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where the models' forms differ."""

    side: Bounds
    guidance_scale: Bounds
    num_inference_steps: Bounds


WAVESPEED: Final = Ranges(LIMITS.side, LIMITS.guidance_scale, LIMITS.num_inference_steps)
# The other vendor's table is in no source whole: its example has 28 steps and guidance 3.5; its siblings' tables have
# sides from 256 and guidance from 1 to 20.
STABILITY: Final = Ranges(Bounds(256, 1536, 1024), Bounds(1, 20, 3.5), Bounds(1, 50, 28))
# A video is as much work as its frames, all at once: smaller sides and fewer steps than a picture's.
VIDEO: Final = Ranges(LIMITS.video_side, LIMITS.guidance_scale, Bounds(1, 50, 20))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One id that can be posted to, and the form it takes."""

    id: str
    description: str
    fields: tuple[Field, ...]
    required: tuple[str, ...] = ("prompt",)
    type: Literal["text-to-image", "image-to-image", "image-to-video"] = "text-to-image"
    base_price: int = 0  # USD; a server of one's own bills nothing

    def schema(self) -> Schema:
        """Return the JSON Schema of the request body, fields in the order forms show them."""
        return {
            "type": "object",
            "required": list(self.required),
            "properties": {field.name: field.schema() for field in self.fields},
            "x-order-properties": [field.name for field in self.fields],
            "description": "Unknown keys are ignored; null means not given.",
        }


def find_served(path: str) -> ServedModel | None:
    """Return the model of this id, in any case and with slashes around it."""
    return _BY_ID.get(path.strip("/").lower())


def _form(ranges: Ranges, *, loras: bool) -> tuple[Field, ...]:
    """Return the form: first the documented fields in their order, then the further ones."""
    fields = (*_pictures(), *_loras(), *_work(ranges), *_flags(), *_extras(ranges))
    return tuple(field for field in fields if loras or not field.name.startswith("lora"))


def _pictures() -> Iterable[Field]:
    return (
        Text("prompt", "What to draw.", min_chars=1),
        Picture("image", "Start picture: a URL, data URI or base64 of a PNG, JPEG, WebP, GIF or BMP."),
        Picture("mask_image", "Where to paint in `image`: white is painted, black is kept. Also `mask`.", mask=True),
        Number(
            "strength",
            "How far from the start picture; without one it is unused. Also `prompt_strength`.",
            LIMITS.strength,
        ),
    )


def _loras() -> Iterable[Field]:
    return (Loras("loras", "LoRAs to apply, each `{path, scale}`."),)


def _work(ranges: Ranges) -> Iterable[Field]:
    return (
        Size("size", f"Width*height in pixels, each a multiple of {LIMITS.side_multiple}; also WxH.", ranges.side),
        Integer("num_inference_steps", "Denoising steps.", ranges.num_inference_steps),
        Number(
            "guidance_scale",
            "How closely the prompt is followed; at 1 and below guidance is off.",
            ranges.guidance_scale,
            step=0.1,
        ),
        Integer("num_images", "Pictures to make; picture i uses seed + i.", LIMITS.num_images),
        Integer(
            "seed", "Start of the random numbers; -1 draws one, which is reported back.", LIMITS.seed, slider=False
        ),
    )


def _video() -> tuple[Field, ...]:
    """Return the form of image to video: the words are those of pictures; frames stand in place of their number."""
    picture = Picture("image", "The picture that the video begins with: a URL, data URI or base64.")
    strength = Number("strength", "How far the frames may go from the start picture.", LIMITS.video_strength)
    motion = Choice(
        "motion",
        "How the picture is moved before it is drawn over, one loop a second. `auto`: `bounce` with the built-in "
        "motion adapter, which moves little by itself; `none` with others.",
        MOTIONS[0],
        MOTIONS,
    )
    own = (
        Integer("frames", "Frames of the video; the motion adapter may take fewer.", LIMITS.frames),
        Integer("fps", "Frames a second.", LIMITS.fps),
        motion,
    )
    work = tuple(field for field in _work(VIDEO) if field.name != "num_images")
    shared = {field.name: field for field in _extras(VIDEO)}
    formats = Choice("output_format", "WebM (VP9), or animated WebP.", VIDEO_FORMATS[0], VIDEO_FORMATS)
    negative, *rest = (
        shared[name] for name in ("negative_prompt", "lora_scale", "enable_metadata", "disable_safety_checker")
    )
    prompt = Text("prompt", "What the video shows.", min_chars=1)
    return (prompt, picture, strength, *_loras(), *own, *work, *_flags(), negative, formats, *rest)


def _flags() -> Iterable[Field]:
    return (
        Flag("enable_base64_output", "Answer with naked base64 in place of URLs."),
        Flag(
            "enable_safety_checker",
            "Check each picture: a flagged one becomes black and its `has_nsfw_contents` true. The server may insist.",
            default=True,
        ),
        Flag("enable_sync_mode", "Hold the request until the pictures are done."),
    )


def _extras(ranges: Ranges) -> Iterable[Field]:
    return (
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
            "Steps of the second pass's schedule, of which the last run (`base_image_refiner`); "
            "not given: as the base's.",
            ranges.num_inference_steps,
            optional=True,
        ),
        Choice(
            "acceleration",
            "Exactness given for speed: `balanced` takes about half the time, `fast` two fifths; pictures differ.",
            ACCELERATIONS[0],
            ACCELERATIONS,
        ),
        Number("lora_scale", "Scale of the LoRAs that name none of their own.", LIMITS.lora_scale),
        Flag(
            "enable_metadata",
            "Write prompt, seed and parameters into the pictures' files, where the server does so at all.",
            default=True,
        ),
        Flag(
            "apply_watermark",
            "Taken for compatibility and ignored: no watermark is put into pictures.",
            hidden=True,
        ),
        Flag("disable_safety_checker", "The other way to say `enable_safety_checker: false`.", hidden=True),
    )


MODELS: Final[tuple[ServedModel, ...]] = (
    ServedModel("wavespeed-ai/sdxl-lora", "SDXL with up to five LoRAs.", _form(WAVESPEED, loras=True)),
    ServedModel("wavespeed-ai/sdxl", "SDXL, without LoRAs.", _form(WAVESPEED, loras=False)),
    ServedModel("stability-ai/sdxl-lora", "SDXL with up to five LoRAs, other defaults.", _form(STABILITY, loras=True)),
    ServedModel("stability-ai/sdxl", "SDXL, without LoRAs, other defaults.", _form(STABILITY, loras=False)),
    ServedModel(
        "wavespeed-ai/sdxl-lora/image-to-video",
        "A picture that moves: SDXL with LoRAs and a motion adapter. Experimental.",
        _video(),
        required=("prompt", "image"),
        type="image-to-video",
    ),
)
_BY_ID: Final = {model.id: model for model in MODELS}
