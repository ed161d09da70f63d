"""SDXL's networks: two text encoders, the UNet and the VAE; load, encode, predict, decode.

Knows diffusers and transformers, and is the only file that does. Knows no requests, samplers or noise levels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from impasto.errors import ModelError
from impasto.models.catalog import ModelSource


@dataclass(slots=True, eq=False)
class Sdxl:
    """The component set of an SDXL base model, on one device.

    ``predict`` and ``decode`` take and give float32; inside, the networks run in ``dtype``.
    """

    unet: Any
    vae: Any
    text_encoders: tuple[Any, Any]
    tokenizers: tuple[Any, Any]
    scheduler_config: dict[str, Any]
    zero_absent_negative: bool  # force_zeros_for_empty_prompt: an absent negative prompt is all zeros
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Sdxl:
        """Load a diffusers folder.

        Raises:
            ModelError: A part is missing, cut short or of another kind; the message names the part.
        """
        folder = source.folder

        def network(kind: Any, part: str, at: torch.dtype = dtype) -> Any:
            return _load_network(kind, source, part, at).to(device).requires_grad_(False).eval()

        vae_config = _read_json(source, "vae/config.json")
        # SDXL's own VAE overflows float16 (black pictures); its config says so.
        overflows = dtype == torch.float16 and vae_config.get("force_upcast", True)
        with _no_progress_bars():
            return cls(
                unet=network(UNet2DConditionModel, "unet"),
                vae=network(AutoencoderKL, "vae", torch.float32 if overflows else dtype),
                text_encoders=(
                    network(CLIPTextModel, "text_encoder"),
                    network(CLIPTextModelWithProjection, "text_encoder_2"),
                ),
                tokenizers=(
                    CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
                    CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
                ),
                scheduler_config=_read_json(source, "scheduler/scheduler_config.json"),
                zero_absent_negative=bool(source.index.get("force_zeros_for_empty_prompt", True)),
                device=device,
                dtype=dtype,
            )

    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Embed one prompt with both encoders.

        Returns:
            Tokens ``[77, D]``, the encoders' penultimate hidden states side by side (768 + 1280 for SDXL), and the
            second encoder's pooled projection ``[P]``. Text past the encoders' window is cut.

        Source: Podell et al. 2023 (arXiv:2307.01952), section 2.1.
        """
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            window = tokenizer.model_max_length
            ids = tokenizer(
                prompt, padding="max_length", max_length=window, truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2][0])
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


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal: callers show their own progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load_network(kind: Any, source: ModelSource, part: str, dtype: torch.dtype) -> Any:
    folder = source.folder / part
    plain = list(folder.glob("*.safetensors"))
    if not plain:
        raise ModelError(f"model {source.name!r}: {part} has no .safetensors file (pickles are not loaded)")
    variant = "fp16" if all(".fp16." in path.name for path in plain) else None
    try:
        return kind.from_pretrained(folder, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {source.name!r}: {part} cannot be loaded: {str(error).splitlines()[0]}") from error


def _read_json(source: ModelSource, name: str) -> dict[str, Any]:
    path: Path = source.folder / name
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source.name!r}: {name} cannot be read ({type(error).__name__})") from None
