"""Write a course's networks as diffusers folders in half precision: the base model, and the refiner beside it.

Knows the folders' layout and how the compact vocabulary becomes CLIP's. Does not know how anything was learned. A
folder appears whole or not at all; the shipped model is replaced only where ``--target`` says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor, nn

from training import architecture, card
from training.export import settle_files, settle_scheduler, swap, write_tokenizer
from training.second import autoencoder
from training.second.course import BASES, COURSES, Course
from training.second.learn import Painter, painter
from training.second.places import SECOND
from training.second.reading import LAYERS, Reader
from training.second.refiner import refiner
from training.second.vocabulary import Vocabulary, vocabulary
from training.words import ids_of, tokenizers

LIMIT_BYTES = 80_000_000  # of everything that ships together
LORAS = ("few-steps", "pixel-art", "line-art")
SYNONYMS = {
    "cacti": "cactus",
    "dunes": "sand",
    "dune": "sand",
    "sands": "sand",
    "hills": "mountains",
    "hill": "mountain",
    "peaks": "mountains",
    "peak": "mountain",
    "sundown": "sunset",
    "nightfall": "night",
    "midnight": "night",
    "twilight": "dusk",
    "seas": "sea",
    "lawn": "grass",
    "grassland": "meadow",
    "wintry": "winter",
    "enormous": "huge",
    "giant": "huge",
    "miniature": "tiny",
    "beneath": "under",
    "atop": "above",
}  # words that no caption has, and the one that each is read as
TOKENIZERS = (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))


def full_rows(rows: Tensor, known: Vocabulary) -> Tensor:
    """An embedding table of CLIP's size from the compact one: a word never seen reads as one that changes nothing.

    ``SYNONYMS`` read as the words they stand for; of one with several tokens the first does, the others change nothing.
    """
    filler = rows[list(known.filler_rows)].mean(0, keepdim=True)
    full = filler.repeat(architecture.VOCABULARY, 1)
    for word, meant in SYNONYMS.items():
        full[ids_of(word)[0]] = rows[known.rows[meant][0]]
    full[list(known.used)] = rows
    return full


def expand(small: nn.Module, large: nn.Module, known: Vocabulary) -> None:
    """Copy an encoder into one with CLIP's full vocabulary."""
    state = small.state_dict()
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    large.load_state_dict(state | {name: full_rows(state[name], known)})


def encoders(reader: Reader) -> tuple[nn.Module, nn.Module]:
    """Both text encoders with CLIP's own vocabulary."""
    first, second = architecture.text_encoders(architecture.VOCABULARY, architecture.EOS, architecture.WIDER, LAYERS)
    with torch.no_grad():
        expand(reader.first, first, vocabulary())
        expand(reader.second, second, vocabulary())
    return first, second


def pipeline(made: Painter, vae: AutoencoderKL, whole: bool = True) -> StableDiffusionXLPipeline:
    """The parts in diffusers' pipeline; not ``whole`` without what a refiner does without."""
    first, second = encoders(made.reader)
    tokenizer, tokenizer_2 = tokenizers()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first if whole else None,
        text_encoder_2=second,
        tokenizer=tokenizer if whole else None,
        tokenizer_2=tokenizer_2,
        unet=made.unet,
        scheduler=architecture.scheduler(),
        force_zeros_for_empty_prompt=whole,
        add_watermarker=False,
    )


def write(made: Painter, vae: AutoencoderKL, target: Path, whole: bool = True) -> int:
    """Write one folder; returns its size in bytes."""
    fresh = target.with_name(target.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    pipeline(made, vae, whole).to(dtype=torch.float16).save_pretrained(fresh, safe_serialization=True)
    for name, pad in TOKENIZERS if whole else TOKENIZERS[1:]:
        write_tokenizer(fresh / name, pad)
    settle_scheduler(fresh / "scheduler")
    (fresh / "NOTICE").write_text(card.NOTICE)
    if not whole:
        index = json.loads((fresh / "model_index.json").read_text()) | {"requires_aesthetics_score": True}
        (fresh / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    settle_folder(fresh, whole)
    size = weighed(fresh)
    swap(fresh, target)
    return size


def weighed(folder: Path) -> int:
    """The bytes of all files in a folder.

    Raises:
        ValueError: They are more than may ship.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(f"the exported model has {size} bytes, more than {LIMIT_BYTES}")
    return size


def settle_folder(folder: Path, whole: bool) -> None:
    """``training.export.settle_files``, where the first text encoder may be missing."""
    if whole:
        settle_files(folder)
        return
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def export(course: Course, target: Path, folder: Path = SECOND) -> dict[str, int]:
    """The base in ``target/base``, and, where they have been learned, ``target/refiner`` and ``target/loras``."""
    sizes = {"base": write(painter(course, folder), autoencoder.settled(), target / "base")}
    if (folder / f"{course.name}-refiner.pt").exists():
        learned = refiner(COURSES[f"{course.name}-refiner"], folder)
        sizes["refiner"] = write(learned, autoencoder.settled(), target / "refiner", whole=False)
    for name in LORAS:
        lora = folder / f"{course.name}-{name}.safetensors"
        if lora.exists():
            (target / "loras").mkdir(parents=True, exist_ok=True)
            shutil.copy(lora, target / "loras" / f"{name}.safetensors")
            sizes[name] = lora.stat().st_size
    return sizes


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("course", choices=sorted(BASES))
    asked.add_argument("--target", type=Path, default=SECOND / "export")
    chosen = asked.parse_args()
    for part, size in export(BASES[chosen.course], chosen.target).items():
        print(f"{part}: {size / 1e6:.1f} MB")
