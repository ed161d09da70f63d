"""Draw ``docs/gallery/loras.jpg``: the shipped LoRAs alone and together, at four scales, each row from one seed.

Knows the engine and how to lay out a sheet. Does not know how the LoRAs were learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from impasto.engine.engine import Engine
from impasto.types import GenerationRequest, ImageReady, LoraRef
from training.adapter_files import LORAS
from training.places import GALLERY

SUBJECTS = (("a cactus on a pink background", 1_000_003), ("a red mushroom on a blue background", 1_000_004))
STACKS = (("pixel-art",), ("line-art",), ("pixel-art", "line-art"))
SCALES = (0.0, 0.5, 1.0, 2.0)
SIDE, MARGIN = 256, 28  # of a picture on the sheet, and of the lines of words, in pixels
STEPS, GUIDANCE = 25, 5.0


def draw(engine: Engine, prompt: str, seed: int, stack: tuple[str, ...], scale: float, folder: Path) -> Image.Image:
    """One picture of 512 px, with every LoRA of the stack at the same scale."""
    request = GenerationRequest(
        prompt=prompt,
        width=512,
        height=512,
        seed=seed,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        loras=tuple(LoraRef(str(folder / f"{name}.safetensors"), scale) for name in stack),
    )
    return next(event.image for event in engine.generate(request) if isinstance(event, ImageReady))


def sheet(engine: Engine, folder: Path) -> Image.Image:
    """Rows: each subject with each stack; columns: the scales."""
    rows = [(prompt, seed, stack) for prompt, seed in SUBJECTS for stack in STACKS]
    made = Image.new("RGB", (len(SCALES) * SIDE, MARGIN + len(rows) * (SIDE + MARGIN)), "white")
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(16)
    for column, scale in enumerate(SCALES):
        pen.text((column * SIDE + 6, 5), f"scale {scale:g}", "black", font)
    for row, (prompt, seed, stack) in enumerate(rows):
        top = MARGIN + row * (SIDE + MARGIN)
        pen.text((6, top + 5), f"{' + '.join(stack)}: {prompt}, seed {seed}", "black", font)
        for column, scale in enumerate(SCALES):
            picture = draw(engine, prompt, seed, stack, scale, folder)
            made.paste(picture.resize((SIDE, SIDE), Image.Resampling.BOX), (column * SIDE, top + MARGIN))
    return made


def main() -> None:
    """Draw the sheet and write it."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--loras", type=Path, default=LORAS)
    asked.add_argument("--figure", type=Path, default=GALLERY / "loras.jpg")
    chosen = asked.parse_args()
    made = sheet(Engine.load("builtin", dtype="float32", max_batch=1), chosen.loras)
    chosen.figure.parent.mkdir(parents=True, exist_ok=True)
    made.save(chosen.figure, quality=88)


if __name__ == "__main__":
    main()
