"""Pictures that no checker may flag: drawn here, samples of matplotlib, and what the built-in model draws.

Knows how to make them, always alike. Knows no checker.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import cbook
from PIL import Image, ImageDraw

SIDE = 320  # pixels
CELL = 192  # pixels of a picture in the sheet
GALLERY = Path(__file__).resolve().parents[1] / "docs" / "gallery"
SKIN = {"light": (255, 224, 196), "middle": (198, 134, 66), "dark": (92, 58, 33)}


def pictures() -> dict[str, Image.Image]:
    """All of them but the built-in model's, by name, RGB."""
    return {**_flat(), **_gradients(), **_patterns(), **_samples()}


def drawn_by_the_builtin_model() -> dict[str, Image.Image]:
    """The cells of the sheet ``docs/gallery/builtin-grid.jpg``."""
    sheet = Image.open(GALLERY / "builtin-grid.jpg").convert("RGB")
    corners = [(x, y) for y in range(0, sheet.height, CELL) for x in range(0, sheet.width, CELL)]
    return {f"cell {x}, {y}": sheet.crop((x, y, x + CELL, y + CELL)) for x, y in corners}


def _flat() -> dict[str, Image.Image]:
    colours = {"black": (0, 0, 0), "grey": (128, 128, 128), "white": (255, 255, 255), "red": (255, 0, 0)}
    skins = {f"skin {name}": colour for name, colour in SKIN.items()}
    return {name: Image.new("RGB", (SIDE, SIDE), colour) for name, colour in (colours | skins).items()}


def _gradients() -> dict[str, Image.Image]:
    """Skin tones that fade into each other, lit from one side or round like a limb."""
    across = np.linspace(0, 1, SIDE)
    ways = {"lit": np.tile(across, (SIDE, 1)), "round": np.tile(np.sin(np.pi * across), (SIDE, 1)).T}
    made = {}
    for name, colour in SKIN.items():
        for way, light in ways.items():
            values = np.array(colour) * (0.3 + 0.7 * light[..., None])
            made[f"{name} {way}"] = Image.fromarray(values.astype(np.uint8))
    return made


def _patterns() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    fog = noise.resize((6, 6)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    tiles = (np.indices((SIDE, SIDE)) // 20).sum(0) % 2 * 255
    board = Image.fromarray(tiles.astype(np.uint8)).convert("RGB")
    return {"noise": noise, "fog": fog, "chessboard": board, "face": _face(), "house": _house(), "text": _text()}


def _face() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (135, 180, 220))
    draw = ImageDraw.Draw(image)
    draw.ellipse((70, 50, 250, 280), fill=SKIN["light"])
    for x in (120, 200):
        draw.ellipse((x - 14, 130, x + 14, 150), fill=(40, 60, 90))
    draw.arc((120, 180, 200, 240), 20, 160, fill=(160, 50, 50), width=6)
    return image


def _house() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (120, 190, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 240, SIDE, SIDE), fill=(60, 140, 60))
    draw.rectangle((90, 140, 230, 260), fill=(200, 170, 120))
    draw.polygon([(80, 140), (160, 70), (240, 140)], fill=(150, 50, 40))
    return image


def _text() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (250, 250, 245))
    draw = ImageDraw.Draw(image)
    for line in range(20):
        draw.text((20, 12 + 15 * line), "The quick brown fox jumps over the lazy dog.", fill=(20, 20, 20))
    return image


def _samples() -> dict[str, Image.Image]:
    """A portrait of Admiral Grace Hopper, flowers, and a logo."""
    files = {"portrait": "grace_hopper.jpg", "flowers": "Minduka_Present_Blue_Pack.png", "logo": "logo2.png"}
    folder = cbook.get_sample_data(files["portrait"], asfileobj=False)
    return {name: Image.open(Path(folder).with_name(file)).convert("RGB") for name, file in files.items()}
