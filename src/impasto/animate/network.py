"""The video network at work: all frames of a clip in, predictions out; and the noise schedule its adapter wants.

Knows what UNet and motion layers are given together. Knows no samplers, requests or files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from impasto.engine.conditioning import Embedding
from impasto.engine.sigmas import NoiseSchedule
from impasto.errors import ModelError
from impasto.models.denoiser import Denoiser
from impasto.models.motion import find_adapter, load_adapter, longest, motion_layers, with_motion

# AnimateDiff's own: Guo et al. 2023 (arXiv:2307.04725) and the SDXL adapter's model card.
ANIMATEDIFF: Final = NoiseSchedule(beta_schedule="linear", timestep_spacing="linspace", steps_offset=1)
SCHEDULE_FILE: Final = "scheduler_config.json"  # beside the adapter's weights, if it wants another one


class VideoNetwork:
    """A base UNet with a motion adapter between its frames; takes and gives float32.

    Args:
        denoiser: The base model's UNet; its layers are shared.
        adapter: ``builtin``, a folder or a hub id; ``None``: there is none.

    Raises:
        ModelError: There is no such adapter, it does not fit, or the base model is for inpainting.
    """

    def __init__(self, denoiser: Denoiser, adapter: str | None = "builtin") -> None:
        if adapter is None:
            raise ModelError("this model has no motion adapter of its own: name one (motion_adapter)")
        if denoiser.inpaints:
            raise ModelError("an inpainting model cannot make videos: its network reads a mask; take a base model")
        folder = find_adapter(adapter)
        layers = load_adapter(adapter)
        self._denoiser = denoiser
        self._video: Any = with_motion(denoiser.unet, layers, f"motion adapter {adapter!r}")
        self.schedule = schedule_of(folder)
        self.longest = longest(layers)  # frames
        for layer in motion_layers(self._video).values():  # the base's own layers are where and what they are
            layer.to(denoiser.device, denoiser.dtype)

    def predict(self, latents: Tensor, timestep: Tensor, prompt: Embedding, time_ids: Tensor) -> Tensor:
        """Run the network once over a clip.

        Args:
            latents: Scaled noisy latents of each frame, ``[F, 4, h, w]``, float32.
            timestep: Training timestep, a scalar: the same for all frames.
            prompt: What all frames show.
            time_ids: ``[6]``.

        Returns:
            The predicted noise (or velocity) ``[F, 4, h, w]``, float32.
        """
        device, dtype = self._denoiser.device, self._denoiser.dtype
        frames = len(latents)
        added = {
            "text_embeds": prompt.pooled[None].to(device, dtype),
            "time_ids": time_ids[None].to(device, dtype),
        }
        with self._denoiser.residence.using("unet", self._video):
            output = self._video(
                latents.transpose(0, 1)[None].to(device, dtype),
                timestep.reshape(1).to(device),
                encoder_hidden_states=prompt.tokens[None].expand(frames, -1, -1).to(device, dtype),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        predicted: Tensor = output[0].transpose(0, 1).float()
        return predicted


def schedule_of(folder: Path) -> NoiseSchedule:
    """Return the noise schedule an adapter was trained with: AnimateDiff's, unless its folder says another.

    Raises:
        ModelError: What the folder says cannot be read.
    """
    file = folder / SCHEDULE_FILE
    if not file.is_file():
        return ANIMATEDIFF
    try:
        return NoiseSchedule.from_config(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"motion adapter: {SCHEDULE_FILE} cannot be read ({type(error).__name__})") from None
