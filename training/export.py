"""Write the trained networks as an ordinary diffusers folder in half precision.

Knows the folder layout, the expansion of the compact vocabulary and the licences. Does not know how anything was
trained. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from training import architecture, card
from training.places import BUILTIN
from training.unet import STATE, Painter, painter
from training.vae import trained
from training.words import filler_rows, tokenizers, used_ids, write_vocabulary

LIMIT_BYTES = 60_000_000


@torch.no_grad()
def expand(small: nn.Module, large: nn.Module) -> None:
    """Copy an encoder into one with CLIP's full vocabulary; words never seen read as words that change nothing."""
    state = small.state_dict()
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    rows = state.pop(name)
    filler = rows[list(filler_rows())].mean(0, keepdim=True)
    full = filler.repeat(architecture.VOCABULARY, 1)
    full[list(used_ids())] = rows
    large.load_state_dict(state | {name: full})


def full_text_encoders(trained_painter: Painter) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both encoders with CLIP's own vocabulary."""
    first, second = architecture.text_encoders(architecture.VOCABULARY, architecture.EOS)
    expand(trained_painter.reader.first, first)
    expand(trained_painter.reader.second, second)
    return first, second


def pipeline(trained_painter: Painter, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The trained parts in diffusers' own pipeline."""
    first, second = full_text_encoders(trained_painter)
    tokenizer, tokenizer_2 = tokenizers()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=trained_painter.unet,
        scheduler=architecture.scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def write_tokenizer(folder: Path, pad: str) -> None:
    """A plain CLIP tokenizer folder: vocabulary, merges, settings."""
    shutil.rmtree(folder, ignore_errors=True)
    write_vocabulary(folder)
    marks = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    settings = marks | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "model_max_length": architecture.PROMPT_TOKENS,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n")


def settle_scheduler(folder: Path) -> None:
    """Say two settings that other solvers read and would otherwise guess wrongly."""
    path = folder / "scheduler_config.json"
    settings = json.loads(path.read_text()) | {"clip_sample": False, "set_alpha_to_one": False}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def settle_files(folder: Path) -> None:
    """Let a plain load be in single precision throughout, and let everyone read the files."""
    for part in ("text_encoder", "text_encoder_2"):
        path = folder / part / "config.json"
        settings = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def swap(fresh: Path, target: Path) -> None:
    """Put the new folder in the old one's place."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def export(trained_painter: Painter, vae: AutoencoderKL, target: Path = BUILTIN) -> int:
    """Write the folder; returns its size in bytes."""
    fresh = target.with_name(target.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    pipeline(trained_painter, vae).to(dtype=torch.float16).save_pretrained(fresh, safe_serialization=True)
    write_tokenizer(fresh / "tokenizer", "<|endoftext|>")
    write_tokenizer(fresh / "tokenizer_2", "!")
    settle_scheduler(fresh / "scheduler")
    card.write(fresh)
    for made_for_it in ("loras", "motion"):  # for the model that is replaced: train them anew
        if (target / made_for_it).is_dir():
            shutil.copytree(target / made_for_it, fresh / made_for_it)
    settle_files(fresh)
    size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(f"the exported model has {size} bytes, more than {LIMIT_BYTES}")
    swap(fresh, target)
    return size


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--state", type=Path, default=STATE)
    asked.add_argument("--target", type=Path, default=BUILTIN)
    chosen = asked.parse_args()
    written = export(painter(chosen.state), trained(), chosen.target)
    print(f"{chosen.target}: {written / 1e6:.1f} MB")
