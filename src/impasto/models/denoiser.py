"""One UNet at work, base or refiner: a batch of rows in, predictions out.

Knows what SDXL's UNet is given and gives back. Knows no requests, samplers or noise levels, and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from impasto.models.residence import Residence
from impasto.models.reuse import predict_full, predict_shallow, predict_whole
from impasto.models.spread import Spread
from impasto.models.traced import Traced


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
    spread: Spread | None = None  # divides the rows of calls among the threads of a CPU
    traced: Traced | None = None  # runs calls as TorchScript

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
        output: Tensor = self._run(predict_whole, latents, timesteps, tokens, pooled, time_ids)
        return output.float()

    def predict_keeping(
        self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do as ``predict`` does, and return the deep features as well, for ``predict_shallow``."""
        output, features = self._run(predict_full, latents, timesteps, tokens, pooled, time_ids)
        return output.float(), features

    def predict_shallow(
        self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor, features: Tensor
    ) -> Tensor:
        """Do as ``predict`` does with the deep features of an earlier step: a fraction of the work, and approximate."""
        output: Tensor = self._run(predict_shallow, latents, timesteps, tokens, pooled, time_ids, features)
        return output.float()

    def _run(
        self,
        work: Callable[..., Any],
        latents: Tensor,
        timesteps: Tensor,
        tokens: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        *more: Tensor,
    ) -> Any:
        """Do ``work`` with the UNet and these rows, where and in what format it runs."""
        sample, tokens, pooled, time_ids = (t.to(self.device, self.dtype) for t in (latents, tokens, pooled, time_ids))

        def call(sample: Tensor, times: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor, *more: Tensor) -> Any:
            return work(self.unet, sample, times, tokens, {"text_embeds": pooled, "time_ids": time_ids}, *more)

        part = call if self.traced is None else partial(self.traced, work, call)
        inputs = (sample, timesteps.to(self.device), tokens, pooled, time_ids, *more)
        with self.residence.using("unet", self.unet):
            return part(*inputs) if self.spread is None else self.spread(part, *inputs)
