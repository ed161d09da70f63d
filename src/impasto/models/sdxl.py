"""SDXL whole: text encoders, the base UNet, the VAE and perhaps a refiner, loaded together and ready to run.

Knows which network does what. Knows no requests, samplers or noise levels, and no files: those are ``networks``'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from impasto.errors import ModelError
from impasto.models.catalog import ModelSource, check_roles
from impasto.models.denoiser import Denoiser
from impasto.models.networks import Devices, Dtypes, Networks, load_networks
from impasto.models.residence import Offload, Residence
from impasto.models.text import Prompt, TextEncoders
from impasto.models.vae import Tiles, Vae


@dataclass(slots=True, eq=False)
class Sdxl:
    """The component set of an SDXL model."""

    base: Denoiser
    refiner: Denoiser | None
    vae: Vae
    encoders: tuple[Any, ...]
    text: TextEncoders
    residence: Residence
    devices: Devices

    @classmethod
    def load(
        cls,
        source: ModelSource,
        devices: Devices,
        dtypes: Dtypes,
        *,
        refiner: ModelSource | None = None,
        offload: Offload = "none",
        tiles: Tiles = lambda *_: False,
    ) -> Sdxl:
        """Load a base or inpainting model, and a refiner that shares its second text encoder and VAE.

        Args:
            source: The base.
            devices: Where they run.
            dtypes: Their number formats.
            refiner: The refiner, if any; it must read what the base's second encoder gives.
            offload: Which networks wait on the CPU while others work.
            tiles: Whether the VAE is to do a picture of so many pixels in tiles.

        Raises:
            ModelError: A part is missing, cut short or of another kind; the message names the part.
        """
        check_roles(source, refiner)
        residence = Residence({"unet": devices.unet, "vae": devices.vae, "text": devices.text}, offload)
        found = load_networks(source, dtypes)
        residence.settle("text", *found.text_encoders)
        residence.settle("vae", found.vae)
        make = partial(_denoiser, residence, devices, dtypes)
        model = cls(
            base=make(found),
            refiner=None if refiner is None else make(load_networks(refiner, dtypes, parts=("unet",))),
            vae=Vae(found.vae, devices.vae, residence, tiles),
            encoders=found.text_encoders,
            text=TextEncoders(found.text_encoders, found.tokenizers),
            residence=residence,
            devices=devices,
        )
        if refiner is not None and model.refiner is not None:
            _check_refiner(model.refiner, refiner, model.text)
        return model

    @property
    def device(self) -> torch.device:
        """Where the latents live."""
        return self.devices.unet

    def encode(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Embed one prompt: tokens ``[77 * windows, D]`` of both encoders side by side, and pooled ``[P]``."""
        with self.residence.using("text", *self.encoders):
            return self.text.encode(prompt, self.devices.text)

    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by diffusers' names; the refiner's UNet is ``refiner``."""
        first, second = self.encoders
        refiner = {} if self.refiner is None else {"refiner": self.refiner.unet}
        return {"unet": self.base.unet, "text_encoder": first, "text_encoder_2": second, **refiner}


def _denoiser(residence: Residence, devices: Devices, dtypes: Dtypes, found: Networks) -> Denoiser:
    residence.settle("unet", found.unet)
    return Denoiser(
        unet=found.unet,
        scheduler_config=found.scheduler_config,
        zero_absent_negative=found.zero_absent_negative,
        scores=found.aesthetic,
        device=devices.unet,
        dtype=dtypes.unet,
        residence=residence,
    )


def _check_refiner(refiner: Denoiser, source: ModelSource, text: TextEncoders) -> None:
    """Refuse a refiner that can not read the base's second encoder."""
    if refiner.context_width != text.widths[-1]:
        raise ModelError(
            f"model {source.name!r} can not refine this base model: it reads text {refiner.context_width} wide, "
            f"the base's second encoder gives {text.widths[-1]}"
        )
