"""One UNet at work, base or refiner: a batch of rows in, predictions out.

Knows what SDXL's UNet is given and gives back. Knows no requests, samplers or noise levels, and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impasto.models.residence import Residence
from impasto.models.reuse import predict_full, predict_shallow


@dataclass(slots=True, eq=False)
class Denoiser:
    """A UNet and the schedule it was trained with. Takes and gives float32; inside, it runs in ``dtype``."""

    unet: Any
    scheduler_config: dict[str, Any]
    zero_absent_negative: bool  # force_zeros_for_empty_prompt
    scores: bool  # whether it reads an aesthetic score in place of a target size
    device: torch.device
    dtype: torch.dtype
    residence: Residence

    @property
    def inpaints(self) -> bool:
        """Whether it reads a mask and the masked picture beside the latents (9 channels)."""
        return bool(self.unet.config.in_channels == 9)

    @property
    def context_width(self) -> int:
        """Numbers a token that its cross-attention reads."""
        return int(self.unet.config.cross_attention_dim)

    def predict(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """Run the UNet once over a batch of rows.

        Args:
            latents: Scaled noisy latents ``[N, 4, h, w]``, float32; ``[N, 9, h, w]`` for an inpainting network.
            timesteps: Training timestep of each row, ``[N]``.
            tokens: ``[N, T, D]``; pooled: ``[N, P]``; time_ids: ``[N, 6]``, of a refiner ``[N, 5]``.

        Returns:
            The predicted noise (or velocity) ``[N, 4, h, w]``, float32.
        """
        sample, times = self._moved(latents, timesteps)
        with self.residence.using("unet", self.unet):
            output = self.unet(
                sample,
                times,
                encoder_hidden_states=tokens.to(self.device, self.dtype),
                added_cond_kwargs=self._added(pooled, time_ids),
                return_dict=False,
            )[0]
        return output.float()  # type: ignore[no-any-return]

    def predict_keeping(
        self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do as ``predict`` does, and return the deep features as well, for ``predict_shallow``."""
        sample, times = self._moved(latents, timesteps)
        tokens = tokens.to(self.device, self.dtype)
        with self.residence.using("unet", self.unet):
            output, features = predict_full(self.unet, sample, times, tokens, self._added(pooled, time_ids))
        return output.float(), features

    def predict_shallow(
        self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor, features: Tensor
    ) -> Tensor:
        """Do as ``predict`` does with the deep features of an earlier step: about half the work, and approximate."""
        sample, times = self._moved(latents, timesteps)
        tokens = tokens.to(self.device, self.dtype)
        with self.residence.using("unet", self.unet):
            output = predict_shallow(self.unet, sample, times, tokens, self._added(pooled, time_ids), features)
        return output.float()

    def _moved(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return latents.to(self.device, self.dtype), timesteps.to(self.device)

    def _added(self, pooled: Tensor, time_ids: Tensor) -> dict[str, Tensor]:
        return {
            "text_embeds": pooled.to(self.device, self.dtype),
            "time_ids": time_ids.to(self.device, self.dtype),
        }
