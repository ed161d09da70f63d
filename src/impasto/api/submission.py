"""From a request body to a job.

Knows the form of a served model, what "not given" means, and what the store wants. Knows nothing of HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from impasto.api.fields import Field, Loras, Picture
from impasto.api.models import ALIASES, ServedModel
from impasto.api.pictures import PictureAt, stand_in
from impasto.errors import InvalidInput
from impasto.jobs.records import NewJob
from impasto.types import LIMITS, REFINE_MODES, Animation, GenerationRequest

DEFAULT_PICTURE: Final = LIMITS.num_inference_steps.default * LIMITS.side.default**2  # steps x pixels
DRAWN_SEEDS: Final = 2**32  # a drawn seed is below this, so that every other tool can take it too
SECOND_PASS: Final = 0.3  # about this share of a second pass's schedule is run
PICTURES: Final = ("image", "mask_image")  # they travel as files, not in the row
LORAS: Final = "loras"  # not every model has them
VIDEO_FIELD: Final = "frames"  # a model whose form has it makes videos

# Fields that mean the same, under the same name, on the wire and to the engine.
PLAIN_FIELDS: Final = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "num_images",
    "seed",
    "scheduler",
    "strength",
    "refine",
    "high_noise_frac",
    "refine_steps",
    "acceleration",
)


@dataclass(frozen=True, slots=True)
class Submission:
    """A checked request: every field of the form with its value, ``seed`` already drawn."""

    model: ServedModel
    values: Mapping[str, Any]
    as_sent: Mapping[str, Any]  # the known fields as the client wrote them, without keys of its own

    @classmethod
    def read(
        cls, model: ServedModel, body: Mapping[str, Any], *, refiner: bool = False, videos: bool = True
    ) -> Submission:
        """Check ``body`` against the model's form; ``refiner`` and ``videos`` say what this server can do.

        ``null`` is "not given" and unknown keys are ignored: real clients send both. ``enable_base64_output``
        is false unless asked for, on every route: the hosted form's documents disagree with each other about
        its default, and every client expects URLs when it asked for nothing.

        Raises:
            InvalidInput: A value is wrong or a required one is missing; ``field`` is its path.
        """
        given = {name: value for name, value in body.items() if value is not None}
        values: dict[str, Any] = {}
        as_sent: dict[str, Any] = {}
        for field in sorted(model.fields, key=lambda field: field.name == LORAS):  # their scale is read before them
            values[field.name] = None if field.default is None else field.read(field.default, field.name)
            if isinstance(field, Loras):
                field = field.scaled(values["lora_scale"])
            spellings = [alias for alias, name in ALIASES.items() if name == field.name]
            for name in (*spellings, field.name):
                if name in given:
                    value = field.read(given[name], name)
                    as_sent[name] = _remembered(field, given[name], value)
                    if value is not None:  # an empty picture is none, and leaves the other spelling's
                        values[field.name] = value
        for name in model.required:
            if name not in given or values[name] is None:
                raise InvalidInput(name, f'property "{name}" is missing')
        if VIDEO_FIELD in values and not videos:
            raise InvalidInput(
                "model", f"{model.id} needs a motion adapter, and this server has none: start it with motion_adapter"
            )
        _check_together(values, refiner)
        if values["seed"] < 0:
            values["seed"] = secrets.randbelow(DRAWN_SEEDS)
        return cls(model, values, as_sent)

    @property
    def pictures(self) -> dict[str, bytes | PictureAt]:
        """The start picture and its mask, as far as they were given: as PNG, or the address to fetch."""
        return {name: self.values[name] for name in PICTURES if self.values.get(name) is not None}

    @property
    def sync(self) -> bool:
        """Whether the client wants the request held until the job is done."""
        return bool(self.values["enable_sync_mode"])

    def to_request(self) -> GenerationRequest:
        """Return what the engine is asked for."""
        request = GenerationRequest(**{name: self.values[name] for name in PLAIN_FIELDS if name in self.values})
        width, height = self.values["size"]
        animation = None
        if VIDEO_FIELD in self.values:
            animation = Animation(self.values[VIDEO_FIELD], self.values["fps"], self.values["motion"])
        loras = tuple(self.values.get(LORAS, ()))
        return replace(request, width=width, height=height, loras=loras, animation=animation)

    def to_job(self, key_id: str, pictures: Mapping[str, str] | None = None) -> NewJob:
        """Return the row for the store.

        Its ``cost`` counts steps x pixels x images (or frames), in default pictures.

        Args:
            key_id: Whose job it is.
            pictures: Where each of ``self.pictures`` is stored.
        """
        request = self.to_request()
        values = self.values
        images = request.animation.frames if request.animation else request.num_images
        work = self._steps(request) * request.width * request.height * images
        return NewJob(
            model=self.model.id,
            input={
                "request": request.to_json(),
                "pictures": dict(pictures or {}),
                "output": {
                    "format": values["output_format"],
                    "base64": values["enable_base64_output"],
                    "safety_checker": values["enable_safety_checker"] and not values["disable_safety_checker"],
                    "metadata": values["enable_metadata"],
                },
                "as_sent": dict(self.as_sent),
            },
            key_id=key_id,
            seed=request.seed,
            cost=work / DEFAULT_PICTURE,
            lora_key=tuple(f"{lora.path}@{lora.scale:g}" for lora in request.loras),
        )

    def _steps(self, request: GenerationRequest) -> float:
        """Estimate the steps that run: fewer from a start picture, more with a second pass."""
        steps = float(request.num_inference_steps)
        if "image" in self.pictures:
            steps = max(1.0, steps * request.strength)
        if request.refine == "base_image_refiner":
            steps += SECOND_PASS * (request.refine_steps or request.num_inference_steps)
        return steps


def _check_together(values: Mapping[str, Any], refiner: bool) -> None:
    """Refuse values that are right alone and ask for something that is not there."""
    if values.get("mask_image") is not None and values["image"] is None:
        raise InvalidInput("mask_image", "needs an image to paint into; give image as well")
    if values.get("refine", REFINE_MODES[0]) != REFINE_MODES[0] and not refiner:
        remedy = f"send {REFINE_MODES[0]}, or have the server started with --refiner MODEL"
        raise InvalidInput("refine", f"asks for {values['refine']}, and this server has no refiner: {remedy}")


def _remembered(field: Field, sent: Any, value: Any) -> Any:
    """Return what the row keeps of a value as it was sent: no keys of the client's own, and no pictures."""
    if isinstance(field, Loras):
        return [{"path": lora.path, "scale": lora.scale} for lora in value]
    return stand_in(sent) if isinstance(field, Picture) else sent
