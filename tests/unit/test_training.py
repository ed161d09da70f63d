"""The training recipe: captions, composition, resuming, and the folder it ships. No network, no long run."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from training import batches, captions, export, pools, reading, unet, words
from training.places import BUILTIN
from training.subjects import BACKGROUNDS, CAST, CAST_STYLE, STYLES, SUBJECTS
from training.team import alone


@pytest.fixture(autouse=True)
def ordinary_arithmetic() -> Iterator[None]:
    """Training flushes denormal numbers for speed; the tests after these need them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's merge list, taken from the shipped tokenizer instead of the fetched package."""
    rules = (BUILTIN / "tokenizer" / "merges.txt").read_bytes()
    listed = tmp_path / "bpe.txt.gz"
    listed.write_bytes(gzip.compress(rules))
    monkeypatch.setattr(words, "BPE", listed)
    monkeypatch.setattr(words, "CACHE", tmp_path)


def some_captions(seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        captions.caption(rng, int(rng.integers(len(SUBJECTS))), int(rng.integers(2)), int(rng.integers(10)))
        for _ in range(300)
    ]


def test_captions_are_decided_by_the_seed() -> None:
    assert some_captions(3) == some_captions(3)
    assert some_captions(3) != some_captions(4)


def test_what_a_caption_leaves_out_has_one_meaning() -> None:
    rng = np.random.default_rng(0)
    flat, blue = STYLES.index("flat"), list(BACKGROUNDS).index("blue")
    for subject in range(len(SUBJECTS)):
        assert "flat" in captions.caption(rng, subject, flat, blue)
        assert "blue" in captions.caption(rng, subject, 0, blue)


def test_every_caption_fits_the_compact_vocabulary(vocabulary: None) -> None:
    first, second = words.encode(some_captions(5), 32)
    places, bos, eos, mark = words.tables()
    assert first.max() < len(places) and (first[:, 0] == bos).all()
    assert (first == eos).any(1).all() and (second == mark).any(1).all()


def test_clip_numbers_are_clip_s_own(vocabulary: None) -> None:
    assert words.ids_of("a photo of a cat") == [320, 1125, 539, 320, 2368]


@pytest.mark.parametrize("side", [128, 256, 512, 768, 1024])
def test_the_object_lies_inside_the_frame(side: int) -> None:
    art = np.full((64, 64, 4), 255, np.uint8)
    for seed in range(5):
        spot = pools.place(np.random.default_rng(seed), side)
        picture = pools.compose(art, side, (0, 0, 0), spot)
        shown = picture[0] > 0
        assert picture.shape == (3, side, side)
        assert shown.sum() == spot[0] ** 2
        assert not (shown[0].any() or shown[-1].any() or shown[:, 0].any() or shown[:, -1].any())


def test_reframing_moves_and_widens_without_cutting() -> None:
    latent = torch.zeros(4, 32, 32)
    latent[:, 8:24, 8:24] = 1
    wide = pools.reframe(latent, 32, 48, (2, -3))
    assert wide.shape == (4, 32, 48)
    assert wide.sum() == latent.sum()
    assert wide[0, 10:26, 13:29].all()


def test_the_cast_is_part_of_the_table() -> None:
    assert set(CAST) <= {subject.name for subject in SUBJECTS}
    assert CAST_STYLE in STYLES


def test_a_pool_can_be_narrowed_to_a_cast() -> None:
    pool = pools.Pool(torch.arange(6.0).view(6, 1, 1, 1), np.array([(i, i % 2, 0) for i in range(6)]))
    narrow = pool.only({0, 1, 4}, style=0)
    assert narrow.shows[:, 0].tolist() == [0, 4]
    assert narrow.latents.flatten().tolist() == [0.0, 4.0]


def tiny_pool(*_: object) -> pools.Pool:
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    return pools.Pool(latents, np.array([(i, STYLES.index(CAST_STYLE), i) for i in range(6)]))


def untaught() -> reading.Reader:
    """Text encoders as they are before the reading stage."""
    torch.manual_seed(0)
    return reading.Reader()


def losses_of(state: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> list[float]:
    """Train on a tiny curriculum, asked to stop after some steps."""
    asked = iter(range(100))
    monkeypatch.setattr(unet, "pool", tiny_pool)
    monkeypatch.setattr(unet, "taught", untaught)
    monkeypatch.setattr(unet, "asked_to_stop", lambda: next(asked) >= stop_after)
    tiny = (unet.Stage("tiny", (batches.Frame(16, 16, 128),), 4, 2, (1e-3, 1e-4), tokens=16),)
    return unet.train(alone(), tiny, state)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    vocabulary: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = losses_of(tmp_path / "whole.pt", monkeypatch, 100)
    parts = losses_of(tmp_path / "parts.pt", monkeypatch, 2)
    assert len(parts) == 2
    parts += losses_of(tmp_path / "parts.pt", monkeypatch, 100)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert len(whole) == 4


def test_the_shipped_folder_is_small_and_carries_its_licences() -> None:
    files = [path for path in BUILTIN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= export.LIMIT_BYTES
    notice = (BUILTIN / "NOTICE").read_text()
    assert "Copyright (c) Microsoft Corporation" in notice and "OpenAI" in notice
    assert not [path for path in files if path.suffix in {".py", ".bin", ".pt", ".ckpt"}]


def test_stock_diffusers_loads_the_shipped_folder() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(BUILTIN, dtype=torch.float32)
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert pipeline.scheduler.config.clip_sample is False
    states, _, pooled, _ = pipeline.encode_prompt("zyzzyva qwertz, ein roter Fuchs", device="cpu")
    assert states.shape == (1, 77, 160) and bool(states.isfinite().all() and pooled.isfinite().all())
