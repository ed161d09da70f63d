"""The safety checker that was published with Stable Diffusion 1 (CompVis), by its own formula.

Knows its network, from diffusers, and its files. Knows nothing of where the files come from. Imported when it is set,
and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.functional import normalize

from impasto.errors import ConfigError
from impasto.safety.checker import Verdict
from impasto.safety.weights import WEIGHTS, Source

if TYPE_CHECKING:
    from PIL.Image import Image

NEUTRAL: Final = 0.5  # score of a picture that just reaches a concept's own threshold
THRESHOLD: Final = 0.5005  # margins are rounded to three decimals, and the smallest that counts is 0.001
SPECIAL_CARE: Final = 0.01  # all thresholds fall by this where a concept of special care is seen
OLD_PREFIX: Final = "vision_model.vision_model."  # in published files; the network has one level less today


class CompVisChecker:
    """Compares a picture's CLIP embedding with 17 embeddings of concepts, each of which has its own threshold.

    A picture's score is 0.5 and the largest margin (cosine less threshold), so that the published decision is the
    default threshold, and a lower one is stricter. Paper: Rando et al., 2022, "Red-Teaming the Stable Diffusion
    Safety Filter".

    Args:
        source: Where its files are.
        threshold: Pictures with at least this score are flagged.
        device: Where it runs.

    Raises:
        ConfigError: The files are not this checker's, or not whole.
    """

    name = "compvis"

    def __init__(self, source: Source, threshold: float | None = None, device: str = "cpu") -> None:
        self._threshold = THRESHOLD if threshold is None else threshold
        self._device = torch.device(device)
        try:
            self._processor, self._network = _load(source)
        except Exception as error:
            raise ConfigError(f"safety_checker: {source.version} is not the CompVis checker ({error})") from error
        self._network.eval().to(self._device)
        self.version = f"{source.version}, {self._threshold:g}"

    @torch.inference_mode()
    def check(self, images: Sequence[Image]) -> list[Verdict]:
        """Return one verdict for each picture; their category is ``nsfw``."""
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(self._device)
        scores = (NEUTRAL + self._margins(pixels)).clamp(0, 1).tolist()
        return [Verdict(score >= self._threshold, score, self.name, {"nsfw": score}) for score in scores]

    def _margins(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return each picture's largest margin over a concept's threshold, (B,), on the CPU."""
        network = self._network
        seen = normalize(network.visual_projection(network.vision_model(pixels)[1]))
        special = seen @ normalize(network.special_care_embeds).T - network.special_care_embeds_weights
        careful = (_rounded(special) > 0).any(1, keepdim=True) * SPECIAL_CARE
        concepts = seen @ normalize(network.concept_embeds).T - network.concept_embeds_weights
        return _rounded(concepts + careful).amax(1).cpu()


def _rounded(margins: torch.Tensor) -> torch.Tensor:
    return margins.round(decimals=3)


def _load(source: Source) -> tuple[Any, Any]:
    """Load preprocessor and network, every weight used or an error."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, CLIPConfig

    processor = AutoImageProcessor.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    network = StableDiffusionSafetyChecker(CLIPConfig.from_pretrained(source.folder, local_files_only=True))
    weights = {
        key.replace(OLD_PREFIX, "vision_model."): tensor
        for key, tensor in load_file(source.folder / WEIGHTS).items()
        if not key.endswith("position_ids")  # numbers that count up, which old files have
    }
    network.load_state_dict(weights, strict=True)
    return processor, network
