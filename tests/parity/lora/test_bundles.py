"""A word that a LoRA brings draws exactly what a model draws that has its vectors in its own token embeddings.

The reference is made by hand: the rows of single-letter tokens in both text encoders' tables are the vectors.
Tolerance: none in the states, one level of 255 in pictures.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from impasto.engine.engine import Engine
from impasto.lora.report import LoraReport
from impasto.types import Finished, GenerationRequest, ImageReady, LoraRef
from tests.random_sdxl import WIDTHS, save_random_refiner, save_random_sdxl

MODULE = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
WORD = "qz"  # two tokens of the letter tokenizer, which occur in no prompt beside it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def vectors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(2, width, generator=generator) for width in WIDTHS)


@pytest.fixture(scope="module")
def taught(folder, vectors, tmp_path_factory) -> Path:
    """The same model, whose tables have the vectors where it has the word's two letters."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "taught")
    for part, rows in zip(("", "_2"), vectors, strict=True):
        file = copy / f"text_encoder{part}" / "model.safetensors"
        ids = CLIPTokenizer.from_pretrained(copy / f"tokenizer{part}")(WORD, add_special_tokens=False).input_ids
        assert len(ids) == len(rows)
        tensors = load_file(file)
        table = next(name for name in tensors if name.endswith("token_embedding.weight"))
        tensors[table][ids] = rows.to(tensors[table].dtype)
        save_file(tensors, file, {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def refiner(tmp_path_factory) -> Path:
    return save_random_refiner(tmp_path_factory.mktemp("models") / "refiner")


@pytest.fixture(scope="module")
def loras(vectors, tmp_path_factory) -> tuple[str, str]:
    """A LoRA with the word, and the same without."""
    files = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(6)
    width = sum(WIDTHS)
    plain = {f"{MODULE}.lora_down.weight": torch.randn(2, width, generator=generator),
             f"{MODULE}.lora_up.weight": torch.randn(16, 2, generator=generator)}  # fmt: skip
    bundle = {f"bundle_emb.{WORD}.clip_{letter}": rows for letter, rows in zip("lg", vectors, strict=True)}
    save_file(plain | bundle, files / "with.safetensors")
    save_file(plain, files / "without.safetensors")
    return str(files / "with.safetensors"), str(files / "without.safetensors")


def draw(engine: Engine, lora: str, prompt: str, scale: float = 0.7, **fields) -> tuple[np.ndarray, LoraReport]:
    asked = {"width": 512, "height": 512, "num_inference_steps": 2, "seed": 3} | fields
    events = list(engine.generate(GenerationRequest(prompt, loras=(LoraRef(lora, scale),), **asked)))
    pictures = [event.image for event in events if isinstance(event, ImageReady)]
    [finished] = [event for event in events if isinstance(event, Finished)]
    return np.asarray(pictures[0]).astype(int), finished.reports[0]


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        (f"a {WORD} fox", {}),
        (f"{WORD}", {"negative_prompt": "blue"}),
        ("a fox", {"negative_prompt": f"no {WORD}"}),
        (f"a ({WORD}:1.3) fox BREAK {WORD}", {"prompt_syntax": "weighted"}),
        (f"a {WORD} fox", {"refine": "expert_ensemble_refiner", "high_noise_frac": 0.5}),
    ],
)
def test_a_brought_word_equals_its_vectors_in_the_table(folder, taught, refiner, loras, prompt, fields):
    """In prompt and negative prompt, weighted, in several windows, and for the refiner."""
    with_word, without = loras
    refiner_of = str(refiner) if "refine" in fields else None
    ours, reference = (
        Engine.load(str(path), refiner=refiner_of, device="cpu", dtype="float32") for path in (folder, taught)
    )

    picture, report = draw(ours, with_word, prompt, **fields)
    wanted, _ = draw(reference, without, prompt, **fields)
    untaught, _ = draw(ours, without, prompt, **fields)

    assert abs(picture - wanted).max() <= 1
    assert abs(picture - untaught).max() > 1, "else this proves nothing"
    assert report.embeddings == (WORD,)
    assert report.warnings == ()


def test_the_states_are_the_same_numbers(folder, taught, loras, vectors):
    """Tokens and pooled state, bit for bit."""
    with_word, without = loras
    ours, reference = (Engine.load(str(path), device="cpu", dtype="float32") for path in (folder, taught))
    prompt = f"a {WORD} fox"
    draw(ours, with_word, prompt, guidance_scale=1)
    draw(reference, without, prompt, guidance_scale=1)

    [mine], [theirs] = (list(engine._admission._prompts._known.values()) for engine in (ours, reference))

    assert torch.equal(mine.tokens, theirs.tokens)
    assert torch.equal(mine.pooled, theirs.pooled)


def test_the_word_comes_and_goes_with_the_lora(folder, loras):
    """One engine, the same prompt: on, at another strength, off, on again; no cache mixes them up."""
    with_word, without = loras
    engine = Engine.load(str(folder), device="cpu", dtype="float32")
    prompt = f"a {WORD} fox"

    on, _ = draw(engine, with_word, prompt)
    plain, _ = draw(engine, without, prompt)
    off, report = draw(engine, with_word, prompt, scale=0)
    again, _ = draw(engine, with_word, prompt)
    untouched = draw(engine, with_word, "a fox")[0] - draw(engine, without, "a fox")[0]

    assert np.array_equal(on, again)
    assert not np.array_equal(on, plain)
    assert not np.array_equal(on, off)
    assert report.embeddings == ()
    assert any("its scale for the text encoders is 0" in warning for warning in report.warnings)
    assert not untouched.any(), "a prompt without the word is as before"
