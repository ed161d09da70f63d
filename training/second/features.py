"""What the product's features do to the model's pictures, in figures: LoRA, inpainting, refiner, few steps.

Each is a mean over a few prompts and seeds. Knows requests and measures. Does not know subjects or the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from impasto.types import LoraRef
from training.second import measures
from training.second.hand import Hand
from training.second.measures import Pixels


def features(hand: Hand, names: Sequence[str], loras: Path, refined: bool, few_steps: Path | None) -> dict[str, Any]:
    """What the features do: LoRA by scale, inpainting's seam, the refiner's gain, few steps; means over a few seeds."""
    prompts = [(f"{name} on a {colour} background", 1_100_000 + at) for at, (name, colour) in
               enumerate(zip(names, ("pink", "blue", "yellow", "green"), strict=False))]  # fmt: skip
    found: dict[str, Any] = {}
    if (loras / "pixel-art.safetensors").exists():
        path = str(loras / "pixel-art.safetensors")
        found["pixel_art_squares"] = {
            str(scale): mean(measures.squares(hand.draw(p, s, loras=(LoraRef(path, scale),))) for p, s in prompts)
            for scale in (0.0, 0.5, 1.0)
        }
    plain = [hand.draw(prompt, seed) for prompt, seed in prompts]
    found["inpainting"] = inpainting(hand, prompts, plain)
    found["grain"], found["sharpness"] = (mean(map(m, plain)) for m in (measures.grain, measures.sharpness))
    if refined:
        again = [hand.draw(p, s, refine="expert_ensemble_refiner", high_noise_frac=0.8) for p, s in prompts]
        found["refined_grain"], found["refined_sharpness"] = (
            mean(map(m, again)) for m in (measures.grain, measures.sharpness)
        )
    if few_steps is not None:
        lora = (LoraRef(str(few_steps), 1.0),)
        found["few_steps"] = {
            str(steps): mean(
                measures.sharpness(
                    hand.draw(p, s, loras=lora, scheduler="lcm", num_inference_steps=steps, guidance_scale=1.0)
                )
                for p, s in prompts
            )
            for steps in (4, 8)
        }
    return found


def inpainting(hand: Hand, prompts: Sequence[tuple[str, int]], plain: Sequence[Pixels]) -> dict[str, float]:
    """The right half painted anew: the step across the seam against those beside it, and what changed of the rest."""
    middle = hand.size // 2
    seams: list[float] = []
    kept: list[float] = []
    for (prompt, seed), picture in zip(prompts, plain, strict=True):
        mask = np.zeros((hand.size, hand.size), np.uint8)
        mask[:, middle:] = 255
        start = Image.fromarray(picture.astype(np.uint8))
        made = hand.draw(prompt, seed + 1, image=start, mask_image=Image.fromarray(mask), strength=0.9)
        seams.append(measures.seam(made, middle))
        kept.append(float(np.abs(made[:, : middle - 1] - picture[:, : middle - 1]).mean()))
    return {"seam": round(float(np.mean(seams)), 3), "kept_part_changed": round(float(np.mean(kept)), 4)}


def mean(values: Any) -> float:
    """The mean, to four figures."""
    return float(f"{np.mean(list(values)):.4g}")
