"""SDXL's networks at work: two text encoders, the UNet and the VAE; encode, predict, decode.

Knows what the networks are given and give back. Knows no requests, samplers or noise levels, and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from impasto.errors import InvalidInput
from impasto.models.catalog import ModelSource
from impasto.models.networks import load_networks

MAX_WINDOWS = 20  # of a prompt; 1,500 tokens


@dataclass(slots=True, eq=False)
class Sdxl:
    """The component set of an SDXL base model, on one device.

    ``predict`` and ``decode`` take and give float32; inside, the networks run in ``dtype``.
    """

    unet: Any
    vae: Any
    text_encoders: tuple[Any, Any]
    tokenizers: tuple[Any, ...]
    scheduler_config: dict[str, Any]
    zero_absent_negative: bool  # force_zeros_for_empty_prompt: an absent negative prompt is all zeros
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Sdxl:
        """Load a diffusers folder or a single-file checkpoint.

        Raises:
            ModelError: A part is missing, cut short or of another kind; the message names the part.
        """
        found = load_networks(source, dtype)
        networks = (found.unet, found.vae, found.text_encoder, found.text_encoder_2)
        unet, vae, first, second = (network.to(device) for network in networks)
        return cls(
            unet=unet,
            vae=vae,
            text_encoders=(first, second),
            tokenizers=found.tokenizers,
            scheduler_config=found.scheduler_config,
            zero_absent_negative=bool(source.index.get("force_zeros_for_empty_prompt", True)),
            device=device,
            dtype=dtype,
        )

    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Embed one prompt with both encoders.

        Returns:
            Tokens ``[77 * windows, D]``, the encoders' penultimate hidden states side by side (768 + 1280 for SDXL),
            and the second encoder's pooled projection of the first window ``[P]``. A prompt longer than the
            encoders' window is read in several.

        Raises:
            InvalidInput: The prompt has more than ``MAX_WINDOWS`` windows.

        Source: Podell et al. 2023 (arXiv:2307.01952), section 2.1.
        """
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            output = encoder(_windows(tokenizer, prompt).to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2].flatten(0, 1))
        return torch.cat(states, dim=-1), output.text_embeds[0]

    def predict(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """Run the UNet once over a batch of rows.

        Args:
            latents: Scaled noisy latents ``[N, 4, h, w]``, float32.
            timesteps: Training timestep of each row, ``[N]``.
            tokens: ``[N, T, D]``; pooled: ``[N, P]``; time_ids: ``[N, 6]``.

        Returns:
            The predicted noise ``[N, 4, h, w]``, float32.
        """
        output = self.unet(
            latents.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=tokens.to(self.device, self.dtype),
            added_cond_kwargs={
                "text_embeds": pooled.to(self.device, self.dtype),
                "time_ids": time_ids.to(self.device, self.dtype),
            },
            return_dict=False,
        )[0]
        return output.float()  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``[4, h, w]`` to a picture ``[8h, 8w, 3]``, uint8, on the CPU."""
        config = self.vae.config
        latents = latents[None].to(self.device, self.vae.dtype)
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
            mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        picture: Tensor = self.vae.decode(latents, return_dict=False)[0][0].float()
        return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()

    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by diffusers' names."""
        return {"unet": self.unet, "text_encoder": self.text_encoders[0], "text_encoder_2": self.text_encoders[1]}


def _windows(tokenizer: Any, prompt: str) -> Tensor:
    """Cut a prompt into the encoder's windows, each with its own start and end, ``[windows, 77]``."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    room = tokenizer.model_max_length - 2
    chunks = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
    if len(chunks) > MAX_WINDOWS:
        raise InvalidInput("prompt", f"has {len(ids)} tokens; at most {MAX_WINDOWS * room} are read")
    return torch.tensor(
        [
            [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (room - len(chunk))
            for chunk in chunks
        ]
    )
