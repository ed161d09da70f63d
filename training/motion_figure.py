"""Draw ``docs/gallery/motion.jpg`` and measure it: videos of the built-in model, frame by frame, a row for each motion.

Knows the engine, the animator and how to lay out a sheet. Does not know how the adapter was learned.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from impasto.animate.animator import Animator
from impasto.engine.engine import Engine
from impasto.types import LIMITS, Animation, GenerationRequest, ImageReady, Motion, VideoReady
from training.motion_files import MOTION
from training.places import GALLERY

SUBJECTS: tuple[tuple[Motion, str], ...] = (
    ("move", "a car on a yellow background"),
    ("bounce", "a frog on a blue background"),
    ("spin", "a star on a purple background"),
    ("pulse", "a heart on a white background"),
)
SEED = 1_000_003
SIDE, MARGIN = 160, 24  # of a frame on the sheet, and of the lines of words, in pixels
STEPS, GUIDANCE, STRENGTH = 20, 3.0, LIMITS.video_strength.default
FRAMES, FPS = 8, 8
Frames = NDArray[np.float64]


@dataclass(frozen=True)
class Figures:
    """Mean absolute differences of 0..255: between neighbours, from the first frame, of the first from its picture."""

    between: float
    away: float
    start: float


def still(engine: Engine, prompt: str, steps: int) -> Image.Image:
    """The picture that a video begins with."""
    request = GenerationRequest(
        prompt=prompt, width=512, height=512, seed=SEED, num_inference_steps=steps, guidance_scale=GUIDANCE
    )
    return next(event.image for event in engine.generate(request) if isinstance(event, ImageReady))


def video(
    animator: Animator, prompt: str, picture: Image.Image, animation: Animation, guidance: float, steps: int
) -> list[Image.Image]:
    """Its frames."""
    request = GenerationRequest(
        prompt=prompt,
        image=picture,
        width=512,
        height=512,
        seed=SEED,
        num_inference_steps=steps,
        guidance_scale=guidance,
        strength=STRENGTH,
        animation=animation,
    )
    return next(list(event.frames) for event in animator.animate(request) if isinstance(event, VideoReady))


def measure(picture: Image.Image, frames: list[Image.Image]) -> Figures:
    """How much moves, and whether it begins with the picture."""
    pixels: Frames = np.stack([np.asarray(frame, np.float64) for frame in frames])
    first = np.asarray(picture, np.float64)
    return Figures(
        between=float(np.abs(np.diff(pixels, axis=0)).mean()),
        away=float(np.abs(pixels[1:] - pixels[:1]).mean((1, 2, 3)).max()),
        start=float(np.abs(pixels[0] - first).mean()),
    )


def sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """A row of frames for each video, its words above."""
    widest = max(len(frames) for _, frames in rows)
    made = Image.new("RGB", (widest * SIDE, len(rows) * (SIDE + MARGIN)), "white")
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(14)
    for row, (words, frames) in enumerate(rows):
        top = row * (SIDE + MARGIN)
        pen.text((6, top + 4), words, "black", font)
        for column, frame in enumerate(frames):
            made.paste(frame.resize((SIDE, SIDE), Image.Resampling.BOX), (column * SIDE, top + MARGIN))
    return made


def main() -> None:
    """Draw, measure, write."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--adapter", default=str(MOTION))
    asked.add_argument("--frames", type=int, default=FRAMES)
    asked.add_argument("--guidance", type=float, default=GUIDANCE)
    asked.add_argument("--steps", type=int, default=STEPS)
    asked.add_argument("--motions", nargs="*", default=[motion for motion, _ in SUBJECTS])
    asked.add_argument("--still", action="store_true", help="leave all motion to the adapter")
    asked.add_argument("--figure", type=Path, default=GALLERY / "motion.jpg")
    chosen = asked.parse_args()
    engine = Engine.load("builtin", dtype="float32", max_batch=1)
    animator = Animator(engine, chosen.adapter)
    rows = []
    for motion, prompt in SUBJECTS:
        if motion in chosen.motions:
            picture = still(engine, prompt, chosen.steps)
            animation = Animation(chosen.frames, FPS, "none" if chosen.still else motion)
            frames = video(animator, prompt, picture, animation, chosen.guidance, chosen.steps)
            print(motion, measure(picture, frames), flush=True)
            rows.append((f"{motion}: {prompt}, seed {SEED}", frames))
            chosen.figure.parent.mkdir(parents=True, exist_ok=True)
            sheet(rows).save(chosen.figure, quality=85)


if __name__ == "__main__":
    main()
