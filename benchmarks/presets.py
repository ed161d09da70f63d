"""What does each acceleration save, and what does it do to the picture? ``python -m benchmarks.presets``.

The physics: a guided step is a UNet call of two rows, one without guidance half of that, and a shallow call, which
reuses deep features, about a fifteenth of a whole one in SDXL's operations. A preset (``engine/pace.py``) says which
calls are which, so its time is a sum.

Two tables. *Composed*, for every model: each kind of call and the decode are timed alone and added up over the steps,
beside the operations counted the same way; no picture of thirty steps is drawn, which at full size would take minutes
each. *Drawn*, for models that have learnt something: the same pictures exact and by each preset in turn, their time in
pairs (processor seconds) and their difference. ``--figure FILE`` draws some of them side by side.

``--model full`` is SDXL's real size with random weights: time does not depend on them, pictures of them say nothing.
Prints both, then one line of JSON, which is also written to ``benchmarks/results/presets.json`` (``--out``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.machine import describe
from benchmarks.options import engine_options
from benchmarks.report import RESULTS, publish
from benchmarks.unets import inputs_of
from benchmarks.ways import Ours
from benchmarks.weights import SIZES, model_folder
from impasto.engine.pace import Pace, pace_of
from impasto.models.reuse import predict_full, predict_shallow
from impasto.types import ACCELERATIONS, SCHEDULERS, Acceleration, GenerationRequest

PROMPTS: Final = (
    "a red fox on a blue background",
    "a slice of pizza on a white background",
    "a green frog",
    "3d render of a rocket, yellow background",
    "a panda on a purple background",
    "a mushroom on a green background",
)
FIRST_SEED: Final = 40
SHOWN: Final = 4  # prompts of the figure
SIDE, MARGIN = 256, 28  # of a picture on the figure, and of the lines of words, in pixels


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """A network call: whole, with features kept or not, or shallow; guided or not."""

    depth: str  # "plain", "keeping" or "shallow"
    rows: int  # 2: guided

    def __str__(self) -> str:
        return f"{self.depth}, {'guided' if self.rows == 2 else 'not guided'}"


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A picture, and the processor seconds that it took."""

    image: Image.Image
    seconds: float


def calls_of(pace: Pace, steps: int) -> Counter[Kind]:
    """Count the calls of a text-to-image picture by kind, for samplers of one call a step."""
    found: Counter[Kind] = Counter()
    kept = 0  # halves whose features there are
    for call in range(steps):
        rows = 2 if pace.guides(call / steps) else 1
        if pace.whole(call, 0, steps) or rows > kept:
            kept = rows if pace.reuses else 0
            found[Kind("keeping" if pace.reuses else "plain", rows)] += 1
        else:
            found[Kind("shallow", rows)] += 1
    return found


def operations(config: Any, side: int) -> dict[str, float]:
    """Operations of one row of a call, by depth, on a network without memory."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(dict(config))
        cells, tokens = side // roofline.CELL, torch.empty(1, roofline.TOKENS, config["cross_attention_dim"])
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        given = torch.empty(1, config["in_channels"], cells, cells), torch.empty(1), tokens, added
        with FlopCounterMode(display=False) as whole:
            features = predict_full(unet, *given)[1]
        with FlopCounterMode(display=False) as shallow:
            predict_shallow(unet, *given, features)
    full = float(whole.get_total_flops())
    return {"plain": full, "keeping": full, "shallow": float(shallow.get_total_flops())}


def main() -> None:
    """Time, compose, draw where that says something, and report."""
    options = _options()
    ours = Ours(model_folder(options.model, options.models), options.device, options.dtype, options.accel)
    composed = [row for side in options.sizes for row in compose(ours, side, options)]
    learnt = options.model not in SIZES and not options.composed_only
    drawn = draw_all(ours, options) if learnt else []
    result = {
        "benchmark": "presets",
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "accel": options.accel,
        "steps": options.steps,
        "composed": composed,
        "drawn": drawn,
        "machine": describe(),
    }
    if drawn:
        Console(file=sys.stdout, width=120).print(_drawn_table(drawn))
    publish(_composed_table(composed), result, options.out)


def compose(ours: Ours, side: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time each kind of call that the presets make, and add them up.

    Returns:
        A row for each preset: ``calls`` by kind, ``seconds_composed`` (processor seconds of the UNet calls and the
        decode), ``times_exact`` and ``times_exact_unet`` (how often it fits into exact's time, with and without the
        decode), and ``times_exact_operations``, the same of the UNet's operations, counted.
    """
    counts = {name: calls_of(_pace(name, options.steps), options.steps) for name in options.presets}
    kinds = sorted({kind for counted in counts.values() for kind in counted})
    seconds = _call_seconds(ours, side, kinds, options.runs)
    decode = _decode_seconds(ours, side, options.runs)
    work = operations(ours.engine._model.base.unet.config, side)
    sums = {name: sum(n * seconds[kind] for kind, n in counted.items()) for name, counted in counts.items()}
    flop = {name: sum(n * kind.rows * work[kind.depth] for kind, n in calls.items()) for name, calls in counts.items()}
    exact = ACCELERATIONS[0]
    return [
        {
            "side": side,
            "preset": name,
            "calls": {str(kind): n for kind, n in sorted(counts[name].items())},
            "seconds_of_a_call": {str(kind): round(seconds[kind], 4) for kind in sorted(counts[name])},
            "seconds_to_decode": round(decode, 4),
            "seconds_composed": round(sums[name] + decode, 3),
            "times_exact": round((sums[exact] + decode) / (sums[name] + decode), 3),
            "times_exact_unet": round(sums[exact] / sums[name], 3),
            "times_exact_operations": round(flop[exact] / flop[name], 3),
            "tflop_unet": float(f"{flop[name] / 1e12:.4g}"),
        }
        for name in options.presets
    ]


@torch.inference_mode()
def _call_seconds(ours: Ours, side: int, kinds: list[Kind], runs: int) -> dict[Kind, float]:
    """Median seconds of each kind of call, after one that does not count."""
    denoiser, found = ours.engine._model.base, {}
    for rows in sorted({kind.rows for kind in kinds}):
        given = inputs_of(denoiser.unet.config, side, rows)
        features = denoiser.predict_keeping(*given)[1]
        calls: dict[str, Callable[[], object]] = {
            "plain": lambda: denoiser.predict(*given),  # noqa: B023  (called before the next round)
            "keeping": lambda: denoiser.predict_keeping(*given),  # noqa: B023
            "shallow": lambda: denoiser.predict_shallow(*given, features),  # noqa: B023
        }
        for kind in (kind for kind in kinds if kind.rows == rows):
            found[kind] = _median(calls[kind.depth], str(denoiser.device), runs)
            print(json.dumps({"side": side, "call": str(kind), "seconds": round(found[kind], 4)}), file=sys.stderr)
    return found


@torch.inference_mode()
def _decode_seconds(ours: Ours, side: int, runs: int) -> float:
    vae = ours.engine._model.vae
    latents = torch.randn(4, side // roofline.CELL, side // roofline.CELL)
    return _median(lambda: vae.decode(latents), str(ours.engine._model.device), runs)


def _median(call: Callable[[], object], device: str, runs: int) -> float:
    """Median seconds of a call after one that does not count: the processor's on a CPU, the clock's on a GPU."""
    clock = time.process_time if torch.device(device).type == "cpu" else lambda: roofline.now(device)
    call()
    found = []
    for _ in range(runs):
        start = clock()
        call()
        found.append(clock() - start)
    return statistics.median(found)


def draw_all(ours: Ours, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw every picture exact and by each preset, in turn, and compare; the first round does not count.

    Returns:
        A row for each size, sampler, guidance and preset: ``times_exact`` (median of pairs of neighbours), and against
        the exact picture ``psnr_db`` (median), ``psnr_db_worst``, ``pixel_mean`` (mean absolute difference, of 255).
    """
    rows: list[dict[str, Any]] = []
    ours.draw(_request(PROMPTS[0], FIRST_SEED, options.sizes[0], SCHEDULERS[0], 5.0, 2))
    for side, scheduler, guidance in itertools.product(options.sizes, options.schedulers, options.guidance):
        pictures: dict[str, list[Drawn]] = {name: [] for name in options.presets}
        for position, prompt in enumerate(PROMPTS[: options.prompts]):
            request = _request(prompt, FIRST_SEED + position, side, scheduler, guidance, options.steps)
            for name in options.presets:
                pictures[name].append(_draw(ours, replace(request, acceleration=name)))
        setting = {"side": side, "scheduler": scheduler, "guidance": guidance}
        for name in options.presets:
            row = setting | {"preset": name} | compare(pictures[name], pictures[ACCELERATIONS[0]])
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
        if options.figure and len(rows) == len(options.presets):
            sheet(pictures).save(options.figure, quality=90)
    return rows


def _draw(ours: Ours, request: GenerationRequest) -> Drawn:
    start = time.process_time()
    image = ours.draw(request)
    assert isinstance(image, Image.Image)
    return Drawn(image, time.process_time() - start)


def compare(drawn: list[Drawn], exact: list[Drawn]) -> dict[str, Any]:
    """Time and difference of pictures against the same ones, exact; ``psnr_db``: ``None`` where they are identical."""
    pairs = list(zip(drawn, exact, strict=True))
    psnr = [psnr_db(a.image, b.image) for a, b in pairs]
    return {
        "seconds": round(statistics.median(a.seconds for a in drawn), 3),
        "times_exact": round(statistics.median(b.seconds / a.seconds for a, b in pairs), 3),
        "psnr_db": None if None in psnr else round(statistics.median(p for p in psnr if p is not None), 1),
        "psnr_db_worst": min((round(p, 1) for p in psnr if p is not None), default=None),
        "pixel_mean": round(
            statistics.mean(float(np.abs(_pixels(a.image) - _pixels(b.image)).mean()) for a, b in pairs), 2
        ),
    }


def psnr_db(a: Image.Image, b: Image.Image) -> float | None:
    """Peak signal to noise of two pictures in dB; ``None``: they are identical."""
    error = float(((_pixels(a) - _pixels(b)) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else None


def _pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(image, dtype=np.float64)


def sheet(pictures: dict[str, list[Drawn]]) -> Image.Image:
    """Lay out some pictures: a row for each prompt, a column for each preset, with time and difference."""
    count = min(SHOWN, len(next(iter(pictures.values()))))
    made = Image.new("RGB", (len(pictures) * SIDE, count * (SIDE + MARGIN)), "white")
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(15)
    for column, (name, drawn) in enumerate(pictures.items()):
        for row, (one, exact) in enumerate(list(zip(drawn, pictures[ACCELERATIONS[0]], strict=True))[:count]):
            top, psnr = row * (SIDE + MARGIN), psnr_db(one.image, exact.image)
            told = "" if psnr is None else f": {exact.seconds / one.seconds:.1f}x, {psnr:.0f} dB"
            pen.text((column * SIDE + 6, top + 5), f"{name}{told}", "black", font)
            small = one.image.resize((SIDE, SIDE), Image.Resampling.BOX)
            made.paste(small, (column * SIDE, top + MARGIN))
    return made


def _request(prompt: str, seed: int, side: int, scheduler: str, guidance: float, steps: int) -> GenerationRequest:
    return GenerationRequest(
        prompt,
        width=side,
        height=side,
        num_inference_steps=steps,
        guidance_scale=guidance,
        scheduler=scheduler,
        seed=seed,
    )


def _pace(name: Acceleration, steps: int) -> Pace:
    return pace_of(GenerationRequest("x", num_inference_steps=steps, acceleration=name))


def _composed_table(rows: list[dict[str, Any]]) -> Table:
    made = Table(
        "size", "preset", "calls", "s, composed", "times exact", "UNet alone", "by operations", title="Composed"
    )
    for row in rows:
        calls = "; ".join(f"{n} {kind}" for kind, n in row["calls"].items())
        figures = (f"{row[name]:.2f}" for name in ("times_exact", "times_exact_unet", "times_exact_operations"))
        made.add_row(str(row["side"]), row["preset"], calls, f"{row['seconds_composed']:.2f}", *figures)
    return made


def _drawn_table(rows: list[dict[str, Any]]) -> Table:
    names = ("size", "sampler", "guidance", "preset", "CPU s", "times exact", "PSNR, dB", "worst", "mean pixel")
    made = Table(*names, title="Drawn")
    for row in rows:
        psnr = (("identical" if row[name] is None else f"{row[name]:.1f}") for name in ("psnr_db", "psnr_db_worst"))
        setting = (str(row["side"]), row["scheduler"], f"{row['guidance']:g}", row["preset"])
        times = f"{row['seconds']:.2f}", f"{row['times_exact']:.2f}"
        made.add_row(*setting, *times, *psnr, f"{row['pixel_mean']:.2f}")
    return made


def _options() -> argparse.Namespace:
    asked = engine_options(__doc__)
    asked.add_argument("--accel", default="auto", help="the engine's switches")
    asked.add_argument("--presets", nargs="+", default=list(ACCELERATIONS), choices=ACCELERATIONS)
    asked.add_argument("--sizes", type=int, nargs="+", default=[512], help="sides, in pixels")
    asked.add_argument("--steps", type=int, default=30)
    asked.add_argument("--runs", type=int, default=2, help="counted runs of each kind of call")
    asked.add_argument("--schedulers", nargs="+", default=["euler"], choices=SCHEDULERS)
    asked.add_argument("--guidance", type=float, nargs="+", default=[5.0])
    asked.add_argument(
        "--prompts", type=int, default=len(PROMPTS), help=f"pictures of each setting, up to {len(PROMPTS)}"
    )
    asked.add_argument("--composed-only", action="store_true", help="draw no pictures")
    asked.add_argument("--figure", type=Path, help="write the first setting's pictures side by side to this file")
    asked.add_argument("--out", type=Path, default=RESULTS / "presets.json")
    options = asked.parse_args()
    options.presets = [name for name in ACCELERATIONS if name in options.presets or name == ACCELERATIONS[0]]
    return options


if __name__ == "__main__":
    main()
