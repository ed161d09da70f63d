"""Turn the fetched drawings into pixels, once, and keep them as arrays.

Knows SVG files and how to rasterise them. Does not know backgrounds, captions or latents.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.places import CACHE, PACKAGES
from training.subjects import STYLES, SUBJECTS

Pixels = NDArray[np.uint8]

FOLDERS = {"3d": "fluent-emoji-modern", "flat": "fluent-emoji-flat"}
LEVELS = (512, 384, 256, 192, 128)


def rasterise(svg: Path, size: int) -> Pixels:
    """One drawing as a square RGBA array."""
    import resvg_py  # only where drawings are made

    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return np.asarray(picture.resize((size, size)) if picture.size != (size, size) else picture)


def shrink(picture: Pixels, size: int) -> Pixels:
    """Resize with premultiplied alpha, so that no dark fringe appears around the object."""
    return np.asarray(
        Image.fromarray(picture).convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    )


def drawing(style: str, code: str) -> Path:
    """The file that shows one emoji in one style."""
    return PACKAGES / FOLDERS[style] / "assets" / f"{code}.svg"


def subject_art() -> Pixels:
    """All subjects in all styles: an array (subject, style, 512, 512, 4), cached on disk."""
    table = zlib.crc32(repr([(s.code, STYLES) for s in SUBJECTS]).encode())
    kept = CACHE / f"art-{table:08x}.npy"
    if not kept.exists():
        art = np.stack([np.stack([rasterise(drawing(style, s.code), 512) for style in STYLES]) for s in SUBJECTS])
        CACHE.mkdir(parents=True, exist_ok=True)
        np.save(kept, art)
    return np.asarray(np.load(kept, mmap_mode="r"))


def other_art(count: int, seed: int = 0) -> Pixels:
    """A sample of all other drawings (count, 256, 256, 4): it teaches the autoencoder shapes beyond the subjects."""
    kept = CACHE / f"other-{count}-{seed}.npy"
    if not kept.exists():
        used = {s.code for s in SUBJECTS}
        files = sorted(p for p in (PACKAGES / FOLDERS["3d"] / "assets").glob("*.svg") if p.stem not in used)
        chosen = np.random.default_rng(seed).choice(len(files), count, replace=False)
        np.save(kept, np.stack([rasterise(files[i], 256) for i in chosen]))
    return np.asarray(np.load(kept, mmap_mode="r"))
