"""From a request to its rows: legs, conditioning, starting latents and masks.

Knows requests, the model and the LoRAs in use. Knows nothing of turns, batches or events.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from impasto.engine.batch import InFlight, Row
from impasto.engine.conditioning import Conditioning, Embedding, PromptCache, score_ids, size_ids
from impasto.engine.latents import Kept, Posterior, cell_mask, latent_shape, noise, seeded
from impasto.engine.legs import Leg, Stage, plan_legs
from impasto.engine.pictures import OPAQUE, Start
from impasto.engine.samplers import SAMPLERS
from impasto.engine.sigmas import NoiseSchedule
from impasto.engine.words import Words, words_of
from impasto.errors import InvalidInput
from impasto.lora.apply import TEXT_NETWORKS, Adapters, LoraSet
from impasto.lora.report import LoraReport
from impasto.models.sdxl import Sdxl
from impasto.types import LIMITS, GenerationRequest, seed_of_image

KEPT_BELOW = 0.5  # of the mask: what an inpainting network may see of the start picture


class Admission:
    """Turns requests into rows.

    Args:
        model: The networks.
        adapters: The LoRAs of the base model.
        schedules: The noise schedule of each stage the model has.
    """

    def __init__(self, model: Sdxl, adapters: Adapters, schedules: Mapping[Stage, NoiseSchedule]) -> None:
        self._model = model
        self._adapters = adapters
        self._schedules = schedules
        self._prompts = PromptCache(lambda prompt: Embedding(*model.encode(prompt)))
        self._row_ids = itertools.count()

    def admit(self, request_id: str, request: GenerationRequest, preview_every: int = 0) -> InFlight:
        """Return the request with its rows; a seed of -1 is drawn.

        Raises:
            ImpastoError: The request cannot be run; ``field`` says why.
        """
        if request.refine != "no_refiner" and "refiner" not in self._schedules:
            raise InvalidInput("refine", "needs a refiner, and this engine was loaded without one")
        if request.seed == -1:
            request = replace(request, seed=secrets.randbelow(int(LIMITS.seed.high) + 1))
        start = Start.of(request)
        loras = self._adapters.resolve(request.loras)
        contents = self._adapters.report(loras)
        words = words_of(request.embeddings, loras, contents)
        reports = tuple(
            LoraReport.of(held, asked.path, asked.scale, position).speaking(words.used[position], words.notes[position])
            for position, (asked, held) in enumerate(zip(request.loras, contents, strict=True))
        )
        legs = plan_legs(request, SAMPLERS[request.scheduler], self._schedules)
        flight = InFlight(
            request, loras, reports, start, steps=sum(leg.steps for leg in legs), preview_every=preview_every
        )
        with self._adapters.active(loras, *TEXT_NETWORKS):
            conditioning = self._conditioning(request, words, self._adapters.touching(loras, *TEXT_NETWORKS))
        scene = Scene.of(self._model, start, (request.width, request.height))
        for index in range(request.num_images):
            flight.rows[next(self._row_ids)] = self._row(request_id, request, index, legs, conditioning, scene)
        flight.started = time.perf_counter()
        return flight

    def _conditioning(self, request: GenerationRequest, words: Words, loras: LoraSet) -> dict[Stage, Conditioning]:
        """What steers each stage. Both read the same embeddings; the refiner knows the second encoder's half alone."""
        prompt = words.prompt(request.prompt, request.prompt_syntax)
        negative = None
        if request.negative_prompt is not None:
            negative = words.prompt(request.negative_prompt, request.prompt_syntax)

        def embedded(zero_absent: bool) -> tuple[Embedding, Embedding | None]:
            if request.guidance_scale <= 1:
                return self._prompts.embed(prompt, loras), None
            return self._prompts.pair(prompt, negative, loras, zero_absent=zero_absent)

        size = (request.width, request.height)
        ids = size_ids(*size)
        steers: dict[Stage, Conditioning] = {
            "base": Conditioning(*embedded(self._model.base.zero_absent_negative), ids, ids)
        }
        if request.refine != "no_refiner" and (refiner := self._model.refiner) is not None:
            scores = (request.aesthetic_score, request.negative_aesthetic_score)
            liked, disliked = (score_ids(*size, score) if refiner.scores else ids for score in scores)
            halves = (half and half.last(refiner.context_width) for half in embedded(refiner.zero_absent_negative))
            wanted, unwanted = halves
            if wanted is not None:
                steers["refiner"] = Conditioning(wanted, unwanted, liked, disliked)
        return steers

    def _row(
        self,
        request_id: str,
        request: GenerationRequest,
        index: int,
        legs: tuple[Leg, ...],
        conditioning: Mapping[Stage, Conditioning],
        scene: Scene,
    ) -> Row:
        seed = seed_of_image(request.seed, index)
        generator = seeded(seed)
        first, shape = legs[0], latent_shape(request.width, request.height)
        pure = scene.picture is None or (scene.mask is not None and request.strength == 1)
        # The order of the draws is diffusers', so that the same seed is the same picture.
        clean = None
        if scene.picture is not None and not (pure and scene.masked is not None):
            clean = scene.picture.sample(generator)
        fresh = noise(shape, generator).to(self._model.device)
        masked = scene.masked.sample(generator) if scene.masked is not None else None
        if scene.mask is not None and masked is None:
            noise(shape, generator)
        if pure or clean is None:
            latents = fresh * first.trajectory.initial_scale
        else:
            latents = clean + first.trajectory.sigmas[first.first] * fresh
        kept = beside = None
        if scene.mask is not None and scene.picture is not None:
            kept = Kept(scene.picture.mean if clean is None else clean, fresh, scene.mask)
        if masked is not None and first.stage == "base":
            mask = torch.ones_like(masked[:1]) if scene.mask is None else scene.mask
            beside = torch.cat([mask, masked])
        return Row(
            request_id=request_id,
            request=request,
            index=index,
            seed=seed,
            latents=latents,
            legs=legs,
            sampler=SAMPLERS[request.scheduler],
            conditioning=conditioning,
            generator=generator,
            kept=kept,
            beside=beside,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What every image of a request starts from, as latents.

    Attributes:
        picture: The start picture; ``None`` without one.
        masked: The start picture with the painted part blanked, for networks that read it; ``None`` for others.
        mask: How much to paint, ``[1, h, w]``; ``None`` without a mask.
    """

    picture: Posterior | None
    masked: Posterior | None
    mask: Tensor | None

    @classmethod
    def of(cls, model: Sdxl, start: Start | None, size: tuple[int, int]) -> Scene:
        """Encode what a request of ``size`` (width, height in pixels) starts from."""
        width, height = size
        blank = torch.zeros(3, height, width)
        pixels = blank if start is None else torch.from_numpy(start.pixels.copy()).permute(2, 0, 1) / 127.5 - 1
        mask = None
        if start is not None and start.mask is not None:
            mask = torch.from_numpy(start.mask.copy()) / OPAQUE
        masked = None
        if model.base.inpaints:
            seen = blank if mask is None else pixels * (mask < KEPT_BELOW)
            masked = _posterior(model, seen)
        return cls(
            picture=None if start is None else _posterior(model, pixels),
            masked=masked,
            mask=None if mask is None else cell_mask(mask).to(model.device),
        )


def _posterior(model: Sdxl, pixels: Tensor) -> Posterior:
    mean, std = model.vae.encode(pixels)
    return Posterior(mean.to(model.device), std.to(model.device))
