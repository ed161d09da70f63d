"""What does each faster way save, and what does it cost in exactness? ``python -m benchmarks.accel``.

The physics: a step is one UNet call on a batch of two (with and without the prompt). Compiling, another memory layout
and fused projections do the same sums in another order, so they differ by rounding alone. Reusing deep features skips
most of the network in all but every n-th step; guidance that ends early halves the batch of the steps after. Both
change the picture: by how much, this measures.

All modes make the same pictures in turn, so a machine that slows down slows them all; the ratio to ``plain`` is taken
picture by picture. Prints a table, then one line of JSON, which is also written to ``benchmarks/results/accel.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from impasto.engine.accel import Accel
from impasto.engine.engine import Engine
from impasto.types import GenerationRequest, ImageReady

RESULT = Path(__file__).parent / "results" / "accel.json"
PROMPTS = (
    "a red fox on a blue background",
    "a slice of pizza on a white background",
    "a green frog",
    "a star on a purple background",
)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to make a picture; ``exact`` ones differ from ``plain`` by rounding alone."""

    name: str
    exact: bool
    accel: Accel = field(default_factory=Accel)
    changes: dict[str, Any] = field(default_factory=dict)  # to the request


MODES = (
    Mode("plain", True),
    Mode("compile", True, Accel(compile=True)),
    Mode("channels_last", True, Accel(channels_last=True)),
    Mode("fuse_projections", True, Accel(fuse_projections=True)),
    Mode("cuda_graphs", True, Accel(cuda_graphs=True)),
    Mode("fp8", False, Accel(fp8=True)),
    *(Mode(f"reuse_features {n}", False, changes={"reuse_features": n}) for n in (2, 3, 5)),
    *(Mode(f"guidance_end {end}", False, changes={"guidance_end": end}) for end in (0.8, 0.6, 0.5)),
)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A picture, the latents it was decoded from, and how long it took."""

    picture: np.ndarray[Any, Any]  # [H, W, 3], 0 to 255
    latents: torch.Tensor  # [1, 4, h, w], as the VAE was given them
    seconds: float


class Studio:
    """An engine for one set of switches, which also shows the final latents.

    They are noted on their way into diffusers' VAE: an engine gives pictures alone.
    """

    def __init__(self, options: argparse.Namespace, accel: Accel) -> None:
        self._engine = Engine.load(options.model, device=options.device, dtype=options.dtype, accel=accel)

    def draw(self, request: GenerationRequest) -> Drawn:
        """Make the one picture of a request."""
        seen: list[torch.Tensor] = []
        decode = AutoencoderKL.decode

        def noting(vae: AutoencoderKL, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(latents.float().cpu())
            return decode(vae, latents, *args, **kwargs)

        with patch.object(AutoencoderKL, "decode", noting):
            start = time.perf_counter()
            (ready,) = (event for event in self._engine.generate(request) if isinstance(event, ImageReady))
            seconds = time.perf_counter() - start
        return Drawn(np.asarray(ready.image, dtype=np.float64), seen[0], seconds)


def main() -> None:
    """Draw every picture in every mode and report."""
    options = _options()
    modes = [mode for mode in MODES if mode.name == "plain" or mode.name.split()[0] in options.modes]
    studios = {accel: Studio(options, accel) for accel in dict.fromkeys(mode.accel for mode in modes)}
    drawn: dict[str, list[Drawn]] = {mode.name: [] for mode in modes}
    requests = _requests(options)
    for position, request in enumerate([requests[0], *requests]):  # the first round warms up and does not count
        for mode in modes:
            made = studios[mode.accel].draw(replace(request, **mode.changes))
            if position:
                drawn[mode.name].append(made)
    rows = [{"mode": mode.name, "exact": mode.exact} | compare(drawn[mode.name], drawn["plain"]) for mode in modes]
    setting = {name: getattr(options, name) for name in ("model", "device", "dtype", "side", "steps", "seeds")}
    result = {"benchmark": "accel", **setting, "prompts": PROMPTS, "rows": rows, "machine": describe()}
    _print(rows)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def compare(mode: list[Drawn], plain: list[Drawn]) -> dict[str, Any]:
    """Time and error of one mode against the same pictures made the plain way.

    Returns:
        ``seconds`` a picture and ``time_ratio`` (medians); ``pixel_max`` and ``pixel_mean`` differences of 255;
        ``psnr_db`` of the worst picture (``None``: all are identical); ``latents_error``, the largest relative
        difference ``|a - b| / |b|`` of final latents.
    """
    pairs = list(zip(mode, plain, strict=True))
    differences = [np.abs(a.picture - b.picture) for a, b in pairs]
    worst = max(float((d**2).mean()) for d in differences)
    latents = [((a.latents - b.latents).norm() / b.latents.norm()).item() for a, b in pairs]
    return {
        "seconds": round(statistics.median(a.seconds for a in mode), 3),
        "time_ratio": round(statistics.median(a.seconds / b.seconds for a, b in pairs), 3),
        "pixel_max": max(float(d.max()) for d in differences),
        "pixel_mean": round(statistics.mean(float(d.mean()) for d in differences), 4),
        "psnr_db": round(10 * float(np.log10(255**2 / worst)), 1) if worst else None,
        "latents_error": float(f"{max(latents):.2e}"),
    }


def _requests(options: argparse.Namespace) -> list[GenerationRequest]:
    side, steps = options.side, options.steps
    return [
        GenerationRequest(prompt, width=side, height=side, num_inference_steps=steps, seed=seed)
        for seed in range(1, options.seeds + 1)
        for prompt in PROMPTS
    ]


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("mode", "kind", "s", "time / plain", "max pixel", "mean pixel", "PSNR, dB", "latents error")
    for row in rows:
        kind = "exact" if row["exact"] else "approximate"
        psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        error = f"{row['pixel_max']:.0f}", f"{row['pixel_mean']:.3f}", psnr, f"{row['latents_error']:.1e}"
        table.add_row(row["mode"], kind, f"{row['seconds']:.2f}", f"{row['time_ratio']:.2f}", *error)
    Console(file=sys.stdout, width=120).print(table)


def _options() -> argparse.Namespace:
    kinds = list(dict.fromkeys(mode.name.split()[0] for mode in MODES if mode.name != "plain"))
    if not torch.cuda.is_available():
        kinds = [kind for kind in kinds if kind not in ("cuda_graphs", "fp8")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin", help="model to time (default: builtin)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help=f"seeds for each of {len(PROMPTS)} prompts")
    parser.add_argument("--modes", nargs="+", default=kinds, choices=[*kinds, *({"fp8"} - set(kinds))])
    parser.add_argument("--out", type=Path, default=RESULT, help=f"where the figures go (default: {RESULT.name})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
