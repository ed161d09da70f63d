"""Every mode through our engine and through diffusers' pipelines: the final latents of both, from the same files.

Knows which diffusers pipelines make up a mode, and where diffusers is not to be followed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from impasto.engine.engine import Engine
from impasto.engine.trajectories import TCD_ETA
from impasto.types import Failed, GenerationRequest, ImageReady
from tests.parity.test_samplers import reference_class

RELATIVE = 1e-3  # largest difference of final latents, of the largest latent
TIGHT = 1e-5  # the same for the random model, which what steers it moves little: a wrong size id must show
FRACTION = 0.8  # of the noise schedule that is the base's
SECOND_PASS = 0.3  # strength

NO_HISTORY = "diffusers weighs a history of steps that a start picture skips; we weigh what there is"
CUT_STEP = "diffusers cuts a step of two calls in half and repeats one of them; we hand over between steps"
DIFFERENT = {  # (sampler, mode) where diffusers is not to be followed, with why
    **{
        (sampler, mode): NO_HISTORY
        for sampler in ("lms", "lms_karras", "pndm")
        for mode in ("image-to-image", "inpainting", "ensemble", "second pass")
    },
    ("heun", "ensemble"): CUT_STEP,
}


@dataclass(frozen=True)
class Models:
    """Folders of the models that the modes need; ``None`` leaves modes out."""

    base: Path
    inpaint: Path | None = None
    refiner: Path | None = None

    def modes(self) -> list[str]:
        """The modes that these models can run."""
        return [name for name, mode in MODES.items() if getattr(self, mode.needs) is not None]


@dataclass(frozen=True)
class Mode:
    """A mode: the request that asks us for it, and how diffusers is asked."""

    theirs: Callable[["Reference", GenerationRequest], torch.Tensor]
    needs: str = "base"
    change: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()


class Reference:
    """diffusers' pipelines of one set of models, with one sampler."""

    def __init__(self, models: Models, sampler: str) -> None:
        self._models = models
        self._sampler = sampler

    def load(self, kind: Any, part: str, **shared: Any) -> Any:
        """Return a pipeline of that kind, its scheduler changed to the sampler."""
        pipeline = _pipeline(kind, getattr(self._models, part), tuple(shared.items()))
        scheduler, options = reference_class(self._sampler)
        pipeline.scheduler = scheduler.from_config(_config(getattr(self._models, part)), **options)
        return pipeline

    @property
    def base(self) -> Any:
        """The text-to-image pipeline."""
        return self.load(StableDiffusionXLPipeline, "base")

    @property
    def refiner(self) -> Any:
        """The refiner's pipeline, with the base's second encoder and VAE, as its authors run it."""
        base = self.base
        return self.load(StableDiffusionXLImg2ImgPipeline, "refiner", text_encoder_2=base.text_encoder_2, vae=base.vae)


@cache
def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


@cache
def _pipeline(kind: Any, folder: Path, shared: tuple[tuple[str, Any], ...]) -> Any:
    pipeline = kind.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, add_watermarker=False, **dict(shared)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _common(request: GenerationRequest) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "latent",
        "eta": TCD_ETA if request.scheduler == "tcd" else 0.0,
    }


def _text(reference: Reference, request: GenerationRequest) -> torch.Tensor:
    return reference.base(**_common(request), width=request.width, height=request.height).images


def _image(reference: Reference, request: GenerationRequest) -> torch.Tensor:
    pipeline = reference.load(StableDiffusionXLImg2ImgPipeline, "base")
    return pipeline(**_common(request), image=request.image, strength=request.strength).images


def _inpaint(part: str) -> Callable[[Reference, GenerationRequest], torch.Tensor]:
    def run(reference: Reference, request: GenerationRequest) -> torch.Tensor:
        pipeline = reference.load(StableDiffusionXLInpaintPipeline, part)
        size = {"width": request.width, "height": request.height}
        pictures = {"image": request.image, "mask_image": request.mask_image, "strength": request.strength}
        return pipeline(**_common(request), **pictures, **size).images

    return run


def _ensemble(reference: Reference, request: GenerationRequest) -> torch.Tensor:
    common = _common(request)
    size = {"width": request.width, "height": request.height}
    latents = reference.base(**common, **size, denoising_end=FRACTION).images
    return reference.refiner(**common, image=latents, denoising_start=FRACTION).images


def _second_pass(reference: Reference, request: GenerationRequest) -> torch.Tensor:
    common = _common(request)
    latents = reference.base(**common, width=request.width, height=request.height).images
    return reference.refiner(**common, image=latents, strength=SECOND_PASS).images


MODES = {
    "text-to-image": Mode(_text),
    "image-to-image": Mode(_image, pictures=("image",), change={"strength": 0.6}),
    "inpainting": Mode(_inpaint("base"), pictures=("image", "mask_image"), change={"strength": 0.75}),
    "inpainting, 9 channels": Mode(
        _inpaint("inpaint"), "inpaint", pictures=("image", "mask_image"), change={"strength": 1.0}
    ),
    "ensemble": Mode(_ensemble, "refiner", change={"refine": "expert_ensemble_refiner", "high_noise_frac": FRACTION}),
    "second pass": Mode(_second_pass, "refiner", change={"refine": "base_image_refiner"}),
}


def asked(mode: str, **values: Any) -> GenerationRequest:
    """Return the request of a mode; one step alone starts from the full strength, as less would be no step."""
    fixed = {"prompt": "a red fox on a blue background", "seed": 7}
    request = GenerationRequest(**fixed | MODES[mode].change | values)
    pictures = {
        name: make(request.width, request.height)
        for name, make in (("image", painting), ("mask_image", disc))
        if name in MODES[mode].pictures
    }
    if request.num_inference_steps == 1 and pictures:
        pictures["strength"] = 1.0
    return replace(request, **pictures)


def painting(width: int, height: int) -> Image.Image:
    """A start picture: smooth colours with an edge."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([across, down, (across > 0.5) * 0.8], -1)
    return Image.fromarray((colours * 255).astype(np.uint8))


def disc(width: int, height: int) -> Image.Image:
    """A mask with a round hole off the latent grid."""
    across, down = np.meshgrid(np.arange(width) - 0.45 * width, np.arange(height) - 0.55 * height)
    return Image.fromarray(((across**2 + down**2 < (0.3 * width) ** 2) * 255).astype(np.uint8))


def our_latents(engine: Engine, request: GenerationRequest) -> list[torch.Tensor]:
    """Run a request and return the final latents of each image, ``[4, h, w]``, as the VAE is given them."""
    decode, seen = engine._model.vae.decode, []
    engine._model.vae.decode = lambda latents: seen.append(latents.clone()) or decode(latents)
    try:
        events = list(engine.generate(request))
    finally:
        engine._model.vae.decode = decode
    assert not [event for event in events if isinstance(event, Failed)]
    order = [event.index for event in events if isinstance(event, ImageReady)]
    return [latents for _, latents in sorted(zip(order, seen, strict=True), key=lambda pair: pair[0])]


def their_latents(models: Models, mode: str, request: GenerationRequest) -> list[torch.Tensor]:
    """Run each image of a request alone at diffusers."""
    reference = Reference(models, request.scheduler)
    singles = [replace(request, seed=request.seed + i, num_images=1) for i in range(request.num_images)]
    return [MODES[mode].theirs(reference, single)[0] for single in singles]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of the reference ``b``."""
    return float((a - b).abs().max() / b.abs().max())
