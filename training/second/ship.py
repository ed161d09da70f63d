"""Put an exported course in the shipped model's place: base, refiner, LoRAs, and the card beside them.

The refiner goes in without what it shares with the base (text encoder, tokenizer, autoencoder), and the motion adapter
stays, to be trained anew on what now ships. Knows the package's folder. Does not know how anything was exported.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from training import card
from training.adapter_files import CARDS, rows
from training.adapters import RANK
from training.export import swap
from training.places import BUILTIN
from training.second.export import LORAS, weighed
from training.second.few_steps import CARD as FEW_STEPS
from training.second.places import SECOND
from training.second.subjects import COLOURS, LANDS, SKIES, subjects

REFINER_PARTS = ("unet", "scheduler")
README = """# Impasto's built-in model

A small text-to-image model with SDXL's architecture (the same classes, text and size conditioning and noise schedule;
narrower, and with two levels more), trained from nothing on Fluent Emoji art. It exists so that the service draws a
real picture without any download. It is no substitute for SDXL's own weights, and anything outside its list gives some
object of the list or a blend.

- {count} subjects: {subjects}.
- One of them, two side by side or one over the other, or two and three alike; small, large, or on a side.
- Plain backgrounds: {colours}. Sceneries: {lands}, by {skies}, with or without mountains.
- Three styles: soft 3d gradients, `flat icon of ...`, `black and white drawing of ...`.
- Prompts like `a red fox on a blue background`, `a cat next to a mushroom`, `a motorcycle in the desert at sunset`.
- Trained at sizes from 512x512 to 1024x1024 px; up to 1536 only what is where was. A guidance scale of 4 to 5 and 20 to
  30 steps suit it.
- `refiner/` is its refiner, `loras/` holds LoRAs for it, `motion/` layers that let pictures move.

`training/second/` in the repository holds the whole recipe, `docs/model-card.md` what was measured, `NOTICE` the
licences.
"""

LORAS_README = """# LoRAs for the built-in model

| file | trigger words | what it does |
|---|---|---|
{rows}

In a request: `"loras": [{{"path": "pixel-art", "scale": 1}}]`. At scale 0 nothing changes and 1 is what was learned.
The trigger words may be left out: the file alone does it. They fit the built-in model only, and teach it no new
subjects.

Each is a LoRA of rank {rank} over the linear layers of the UNet's attention blocks and the convolutions of its residual
blocks, with kohya's names (`lora_unet_input_blocks_4_1_...`), in float16. They carry the same licences as the model:
Impasto's (Apache-2.0), and for the drawings MIT, Copyright (c) Microsoft Corporation (`../NOTICE`).
`training.second.looks` and `training.second.few_steps` make them again.
"""


def readme() -> str:
    """The card in the model's folder."""
    lands = [f"a {land}" if land in ("desert", "meadow") else land for land in LANDS]
    told = {"colours": COLOURS, "lands": lands, "skies": SKIES, "subjects": [subject.name for subject in subjects()]}
    return README.format(count=len(subjects()), **{name: ", ".join(words) for name, words in told.items()})


def ship(made: Path, target: Path = BUILTIN) -> int:
    """Replace the shipped model by what ``export`` left in a folder; returns the new folder's size in bytes.

    Raises:
        FileNotFoundError: The base, the refiner or a LoRA has not been exported.
        ValueError: Together they are larger than what may ship.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        gather(made, fresh)
        if (target / "motion").is_dir():
            shutil.copytree(target / "motion", fresh / "motion")
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        size = weighed(fresh)
        swap(fresh, target)
    return size


def gather(made: Path, fresh: Path) -> None:
    """Lay out what ships, but for the motion adapter."""
    shutil.copytree(made / "base", fresh)
    for part in REFINER_PARTS:
        shutil.copytree(made / "refiner" / part, fresh / "refiner" / part)
    shutil.copy(made / "refiner" / "model_index.json", fresh / "refiner")
    (fresh / "loras").mkdir()
    for name in LORAS:
        shutil.copy(made / "loras" / f"{name}.safetensors", fresh / "loras")
    (fresh / "loras" / "README.md").write_text(
        LORAS_README.format(rows=rows(CARDS | {"few-steps": FEW_STEPS}), rank=RANK)
    )
    (fresh / "README.md").write_text(readme())
    (fresh / "NOTICE").write_text(card.NOTICE)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--source", type=Path, default=SECOND / "export", help="what `training.second.export` left")
    asked.add_argument("--target", type=Path, default=BUILTIN)
    chosen = asked.parse_args()
    print(f"{chosen.target}: {ship(chosen.source, chosen.target) / 1e6:.1f} MB")
