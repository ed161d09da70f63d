"""The engine as a hand that draws one picture at a time, always in the same way but for what is said.

Knows requests. Does not know what is looked for on the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from impasto.engine.engine import Engine
from impasto.types import GenerationRequest, ImageReady
from training.second.measures import Pixels


@dataclass(frozen=True)
class Hand:
    """Who draws: the engine, and how."""

    engine: Engine
    size: int
    steps: int
    guidance: float

    def draw(self, prompt: str, seed: int, **more: Any) -> Pixels:
        """One picture (height, width, 3) of 0..255."""
        settings: dict[str, Any] = {"width": self.size, "height": self.size, "num_inference_steps": self.steps}
        settings |= {"guidance_scale": self.guidance, "prompt_syntax": "plain"} | more
        request = GenerationRequest(prompt=prompt, seed=seed, **settings)
        return next(np.asarray(e.image, np.float64) for e in self.engine.generate(request) if isinstance(e, ImageReady))
