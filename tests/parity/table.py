"""Write docs/parity.md: how far our final latents are from diffusers', mode by mode and sampler by sampler.

``python -m tests.parity.table`` takes some minutes on two cores; ``--quick`` leaves the trained model out.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch

from impasto.engine.engine import Engine
from impasto.engine.samplers import SAMPLERS
from impasto.models.catalog import BUILTIN_FOLDER
from tests.parity.modes import DIFFERENT, MODES, RELATIVE, Models, asked, difference, our_latents, their_latents
from tests.random_sdxl import save_random_inpaint, save_random_refiner, save_random_sdxl

PAGE = Path("docs/parity.md")
STEPS = (1, 4, 20)
GUIDANCE = (0, 1, 5)
Figure = dict[tuple[str, str], float]  # by sampler and mode: the worst of all cases


def cases(mode: str, sizes: list[tuple[int, int]], steps: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """Steps x guidance x size, one image each, and four images with guidance 5 at 4 steps."""
    for count in steps:
        if mode == "second pass" and count == 1:
            continue  # diffusers refuses: 0.3 of one step is no step
        for guidance in GUIDANCE:
            for width, height in sizes:
                for images in (1, 4) if (count, guidance) == (4, 5) else (1,):
                    yield {
                        "num_inference_steps": count, "guidance_scale": guidance, "width": width, "height": height,
                        "num_images": images,
                    }  # fmt: skip


def measure(models: Models, engines: dict[str, Engine], sizes: list[tuple[int, int]], steps: tuple[int, ...]) -> Figure:
    """Return the largest relative difference of each sampler in each mode."""
    worst: Figure = {}
    for mode in models.modes():
        engine = engines[MODES[mode].needs] if MODES[mode].needs in engines else engines["base"]
        for sampler in SAMPLERS:
            for values in cases(mode, sizes, steps):
                request = asked(mode, scheduler=sampler, **values)
                pairs = zip(our_latents(engine, request), their_latents(models, mode, request), strict=True)
                found = max(difference(ours, theirs) for ours, theirs in pairs)
                worst[sampler, mode] = max(found, worst.get((sampler, mode), 0.0))
            print(f"{mode:24} {sampler:20} {worst[sampler, mode]:.1e}", flush=True)
    return worst


def rows(worst: Figure, modes: list[str]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| sampler | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for sampler in SAMPLERS:
        cells = [
            f"({worst[sampler, mode]:.0e})" if (sampler, mode) in DIFFERENT else f"{worst[sampler, mode]:.0e}"
            for mode in modes
        ]
        lines.append(f"| `{sampler}` | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave the trained model out")
    quick = parser.parse_args().quick
    page = [
        "# Parity with diffusers",
        "",
        f"Made by `python -m tests.parity.table`: diffusers {diffusers.__version__}, torch {torch.__version__},",
        "float32 on a CPU. Each cell is the largest difference between our final latents and diffusers', relative to",
        f"the largest latent, over all cases of its mode; CI holds {RELATIVE:.0e} (`tests/parity/test_modes.py`).",
        "",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = Models(
            save_random_sdxl(folder / "base"),
            save_random_inpaint(folder / "inpaint"),
            save_random_refiner(folder / "refiner"),
        )
        options = {"device": "cpu", "dtype": "float32"}
        engines = {
            "base": Engine.load(str(models.base), refiner=str(models.refiner), **options),
            "inpaint": Engine.load(str(models.inpaint), **options),
        }
        worst = measure(models, engines, [(64, 64), (96, 64)], STEPS)
    page += [
        "## Random weights, 64x64 and 96x64 px",
        "",
        "1, 4 and 20 steps, guidance 0, 1 and 5; four images with guidance 5 at 4 steps.",
        "",
        *rows(worst, list(MODES)),
        "",
    ]
    if not quick:
        models = Models(BUILTIN_FOLDER)
        found = measure(models, {"base": Engine.load("builtin", **options)}, [(512, 512)], (4,))
        page += [
            "## The trained model, 512x512 px",
            "",
            "4 steps, guidance 0, 1 and 5; four images with guidance 5.",
            "",
            *rows(found, models.modes()),
            "",
        ]
    reasons: dict[str, list[str]] = {}
    for (sampler, mode), reason in DIFFERENT.items():
        reasons.setdefault(reason, []).append(f"`{sampler}` in {mode}")
    page += ["## Where we differ on purpose", "", "Figures in brackets are these; no bound holds them.", ""]
    page += [f"- {', '.join(where)}: {reason}." for reason, where in reasons.items()]
    page += [
        "- `pndm` with velocity prediction: diffusers mixes velocities of different noise levels; the paper, and we,",
        "  mix noises.",
        "- One step, or a strength that would leave none: diffusers refuses; at least one step always runs here.",
        "- Four images: image i is diffusers' picture of seed + i made alone.",
        "",
    ]
    PAGE.write_text("\n".join(page))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
