"""The drawings as pixels: rasterised once, packed small, and held as tensors at three sizes.

Knows SVG files and the pack (one WebP a drawing, which is what travels to a machine without the fetched
packages). Does not know backgrounds, scenes or latents.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from training.places import PACKAGES
from training.second.places import SECOND
from training.second.subjects import STYLES, Subject, subjects

SIDE = 384
LEVELS = (384, 192, 96)
FOLDERS = {"3d": "fluent-emoji-modern", "flat": "fluent-emoji-flat", "mono": "fluent-emoji-flat"}
PACK = SECOND / "art.zip"
QUALITY = 92


def rasterise(svg: str) -> Image.Image:
    """An SVG's text as a square RGBA picture."""
    import resvg_py  # not on the machine that only reads the pack

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE))


def greyed(picture: Image.Image) -> Image.Image:
    """A drawing in greys from black to white, whatever its own darkest and lightest are."""
    values = np.asarray(picture.convert("RGBA"), np.float32)
    grey, seen = values[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32), values[..., 3] > 128
    low, high = np.percentile(grey[seen], (1, 99)) if seen.any() else (0.0, 255.0)
    spread = np.clip((grey - low) / max(float(high - low), 64.0), 0, 1) * 235 + 10
    return Image.fromarray(np.dstack([spread, spread, spread, values[..., 3]]).astype(np.uint8), "RGBA")


def source(subject: Subject, style: str) -> str:
    """The SVG of one subject in one style."""
    return (PACKAGES / FOLDERS[style] / "assets" / f"{subject.code}.svg").read_text()


def pack(target: Path = PACK) -> Path:
    """Rasterise every drawing into one archive of WebP files, ``<subject>-<style>.webp``; whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".fresh")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        for subject in subjects():
            for style in STYLES:
                buffer = io.BytesIO()
                drawn = rasterise(source(subject, style))
                (greyed(drawn) if style == "mono" else drawn).save(buffer, "webp", quality=QUALITY, method=4)
                archive.writestr(f"{subject.name}-{style}.webp", buffer.getvalue())
    beside.replace(target)
    return target


def pictures(archive: zipfile.ZipFile) -> Iterator[NDArray[np.uint8]]:
    """Every drawing (side, side, 4), alpha premultiplied, subject by subject and style by style."""
    for subject in subjects():
        for style in STYLES:
            with archive.open(f"{subject.name}-{style}.webp") as file:
                yield np.asarray(Image.open(file).convert("RGBA").convert("RGBa").copy())


def array(path: Path) -> NDArray[np.uint8]:
    """The pack as one array (subjects * styles, 4, side, side), unpacked beside it once and mapped."""
    kept = path.with_suffix(".npy")
    if not kept.exists() or kept.stat().st_mtime < path.stat().st_mtime:
        with zipfile.ZipFile(path) as archive:
            whole = np.stack([picture.transpose(2, 0, 1) for picture in pictures(archive)])
        beside = kept.with_suffix(f".{os.getpid()}.npy")
        np.save(beside, whole)
        beside.replace(kept)
    mapped: NDArray[np.uint8] = np.load(kept, mmap_mode="c")
    return mapped


@dataclass(frozen=True)
class Art:
    """Every drawing at each of ``LEVELS``: uint8 tensors (subjects * styles, 4, side, side), premultiplied."""

    levels: dict[int, Tensor]

    @property
    def device(self) -> torch.device:
        """Where the drawings are."""
        return self.levels[SIDE].device


def load(device: str | torch.device = "cpu", path: Path = PACK) -> Art:
    """The packed drawings, on a device.

    Raises:
        FileNotFoundError: There is no pack yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"no drawings at {path}: run `python -m training.second.art` first")
    whole = torch.from_numpy(array(path)).to(device)
    levels = {SIDE: whole}
    for side in LEVELS[1:]:
        parts = [F.adaptive_avg_pool2d(part.float(), side).round().byte() for part in torch.split(whole, 64)]
        levels[side] = torch.cat(parts)
    return Art(levels)


if __name__ == "__main__":
    from training import fetch

    fetch.fetch()
    print(f"{pack()}: {PACK.stat().st_size / 1e6:.1f} MB")
