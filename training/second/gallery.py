"""Draw the gallery with the command that its page names, and write the page: ``docs/gallery/README.md``.

Every picture is made by ``impasto generate`` in a process of its own, from what ships, so that whoever types the line
gets the picture. Knows the command line. Does not know the engine.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.places import GALLERY
from training.second.preview import sheet

DOCUMENTED = (
    "A pixel art scene of a rugged man riding a sleek, futuristic motorcycle across a desert landscape. The man is "
    "wearing a classic leather jacket and a helmet with a reflective visor. The motorcycle has glowing blue exhaust "
    "pipes and a streamlined design. In the background, there are rolling sand dunes and a bright orange sunset. Add "
    "some pixelated cacti and a distant mountain range for depth."
)  # the example request of the hosted service's documentation, word for word
COLUMNS, SIDE = 4, 192  # of the grid: pictures in a row, pixels of each
QUALITY = 88
PAGE = """# Gallery

<!-- Written by training.second.gallery. -->

What the built-in model draws, and what was typed. The same line gives the same picture on the same kind of processor;
elsewhere it may differ in the last bit of a colour.

## The example request of the hosted service's documentation

With the pixel-art LoRA at scale 1, 1024x1024 px, 30 steps, guidance 5. There are no people in this model's world.

![A motorcycle in a desert at sunset, in pixel art]({documented})

```sh
{command}
```

Over the API it is the request as documented, `nerijs/pixel-art-xl` included, with `"seed": {seed}`.

## One line each

![All of them]({grid})

In rows, from the upper left:

```sh
{lines}
```

`training.second.gallery` draws this page again.
"""


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery: what is typed for it."""

    name: str
    prompt: str
    seed: int
    options: tuple[str, ...] = ("--size", "512*512")

    @property
    def command(self) -> list[str]:
        """The whole command, with the file that it writes."""
        return [
            "impasto", "generate", self.prompt, "-o", f"{self.name}.png", *self.options, "--seed", str(self.seed),
        ]  # fmt: skip


EXAMPLE = Shown("documented-example", DOCUMENTED, 7, ("--size", "1024*1024", "--lora", "pixel-art"))
GRID = (
    Shown("fox", "a fox on a blue background", 1),
    Shown("desert", "a motorcycle in the desert at sunset with mountains", 2),
    Shown("mushroom", "a red mushroom on a green background", 3),
    Shown("whale", "flat icon of a whale on a purple background", 4),
    Shown("pair", "a cat next to a mushroom", 5),
    Shown("castle", "a castle in a meadow", 6),
    Shown("apples", "two apples on a white background", 7),
    Shown("bicycle", "black and white drawing of a bicycle", 8),
    Shown("rocket", "a rocket over a mountain", 9),
    Shown("pixels", "a cactus on a pink background", 10, ("--size", "512*512", "--lora", "pixel-art")),
    Shown("lines", "a guitar on an orange background", 11, ("--size", "512*512", "--lora", "line-art")),
    Shown(
        "few", "a rocket on a dark blue background", 12,
        ("--size", "512*512", "--lora", "few-steps", "--scheduler", "lcm", "--steps", "6", "--guidance", "1"),
    ),
)  # fmt: skip


def draw(shown: Shown, folder: Path) -> Image.Image:
    """Run the picture's command in a folder and open what it wrote.

    Raises:
        subprocess.CalledProcessError: The command failed; what it said is on standard error.
    """
    at, *rest = shown.command
    subprocess.run([Path(sys.executable).with_name(at), *rest], cwd=folder, check=True)
    return Image.open(folder / f"{shown.name}.png").convert("RGB")


def page(grid: str, documented: str) -> str:
    """The page's words, with the two files' names."""
    lines = "\n".join(shlex.join(shown.command) for shown in GRID)
    return PAGE.format(
        documented=documented, grid=grid, command=shlex.join(EXAMPLE.command), seed=EXAMPLE.seed, lines=lines
    )


def main() -> None:
    """Draw everything, then write the files."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--target", type=Path, default=GALLERY)
    target = asked.parse_args().target
    with tempfile.TemporaryDirectory() as folder:
        example, *pictures = (draw(shown, Path(folder)) for shown in (EXAMPLE, *GRID))
    target.mkdir(parents=True, exist_ok=True)
    grid, documented = target / "builtin-grid.jpg", target / f"{EXAMPLE.name}.jpg"
    sheet(pictures, COLUMNS, SIDE).save(grid, quality=QUALITY)
    example.save(documented, quality=QUALITY)
    (target / "README.md").write_text(page(grid.name, documented.name))


if __name__ == "__main__":
    main()
