"""Write docs/parity.md: how far our final latents are from diffusers', mode by mode and sampler by sampler.

``python -m tests.parity.table`` takes about twenty minutes on two cores. ``--only random`` or ``--only trained``
measures one of the two models and keeps the other's figures, which stand in ``benchmarks/results/parity.json``.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch

from benchmarks.machine import describe
from impasto.engine.engine import Engine
from impasto.engine.samplers import SAMPLERS
from impasto.models.catalog import BUILTIN_FOLDER
from tests.parity.modes import DIFFERENT, MODES, RELATIVE, TIGHT, Models, asked, difference, our_latents, their_latents
from tests.random_sdxl import save_random_inpaint, save_random_refiner, save_random_sdxl

PAGE = Path("docs/parity.md")
RESULT = Path("benchmarks/results/parity.json")
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


def rows(worst: dict[str, float], modes: list[str]) -> list[str]:
    """Return a Markdown table; ``worst`` is by ``sampler: mode``."""
    lines = ["| sampler | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for sampler in SAMPLERS:
        figures = [f"{worst[f'{sampler}: {mode}']:.0e}" for mode in modes]
        cells = [f"({x})" if (sampler, mode) in DIFFERENT else x for x, mode in zip(figures, modes, strict=True)]
        lines.append(f"| `{sampler}` | " + " | ".join(cells) + " |")
    return lines


def measure_random() -> Figure:
    """The whole matrix on models with random weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = Models(
            save_random_sdxl(folder / "base"),
            save_random_inpaint(folder / "inpaint"),
            save_random_refiner(folder / "refiner"),
        )
        engines = {
            "base": Engine.load(str(models.base), refiner=str(models.refiner), device="cpu", dtype="float32"),
            "inpaint": Engine.load(str(models.inpaint), device="cpu", dtype="float32"),
        }
        return measure(models, engines, [(64, 64), (96, 64)], STEPS)


def measure_trained() -> Figure:
    """The modes that the model we ship can run, at its own size."""
    return measure(Models(BUILTIN_FOLDER), {"base": Engine.load(device="cpu", dtype="float32")}, [(512, 512)], (4,))


SECTIONS = {
    "random": (
        measure_random,
        "Random weights, 64x64 and 96x64 px",
        "1, 4 and 20 steps, guidance 0, 1 and 5; four images with guidance 5 at 4 steps.",
    ),
    "trained": (
        measure_trained,
        "The trained model, 512x512 px",
        "4 steps, guidance 0, 1 and 5; four images with guidance 5.",
    ),
}


def page(found: dict[str, dict[str, float]]) -> str:
    """Return docs/parity.md from the figures of each section."""
    lines = [
        "# Parity with diffusers",
        "",
        f"Made by `python -m tests.parity.table`: diffusers {diffusers.__version__}, torch {torch.__version__},",
        "float32 on a CPU. Each cell is the largest difference between our final latents and diffusers', relative to",
        f"the largest latent, over all cases of its mode. CI holds {RELATIVE:.0e}, and {TIGHT:.0e} for the random",
        "weights (`tests/parity/test_modes.py`).",
        "",
    ]
    for name, (_, title, cases_run) in SECTIONS.items():
        if name in found:
            modes = [mode for mode in MODES if f"euler: {mode}" in found[name]]
            lines += [f"## {title}", "", cases_run, "", *rows(found[name], modes), ""]
    lines += ["## Where we differ on purpose", "", "Figures in brackets are these; no bound holds them.", ""]
    for reason in dict.fromkeys(DIFFERENT.values()):
        where = [key for key, why in DIFFERENT.items() if why == reason]
        samplers, modes = (", ".join(dict.fromkeys(key[i] for key in where)) for i in (0, 1))
        lines += [f"- {samplers} in {modes}:", f"  {reason}."]
    lines += [
        "- `pndm` with velocity prediction: diffusers mixes velocities of different noise levels; the paper, and we,",
        "  mix noises.",
        "- One step, or a strength that would leave none: diffusers refuses; at least one step always runs here.",
        "- Four images: image i is diffusers' picture of seed + i made alone.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="measure one model, and keep the other's figures")
    only = parser.parse_args().only
    found = json.loads(RESULT.read_text())["sections"] if RESULT.is_file() else {}
    for name in [only] if only else SECTIONS:
        worst = SECTIONS[name][0]()
        found[name] = {f"{sampler}: {mode}": value for (sampler, mode), value in worst.items()}
    RESULT.write_text(json.dumps({"benchmark": "parity", "sections": found, "machine": describe()}, indent=1) + "\n")
    PAGE.write_text(page(found))
    print(f"wrote {PAGE} and {RESULT}")


if __name__ == "__main__":
    main()
