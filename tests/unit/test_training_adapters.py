"""The LoRAs that ship with the built-in model: how they are drawn, learned and written, and that they can be seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from impasto.engine.engine import Engine
from impasto.types import GenerationRequest, ImageReady, LoraRef
from training import adapter_files, adapters, looks, pools, tuning
from training.adapter_files import CARDS, LORAS
from training.subjects import CAST_STYLE, STYLES

NAMES = tuple(CARDS)
CELL = 16  # pixels of a square of pixel art at 512 px
SPOT = (400, 56, 56)


@pytest.fixture(autouse=True)
def ordinary_arithmetic() -> Iterator[None]:
    """Training flushes denormal numbers for speed; the tests after these need them."""
    yield
    torch.set_flush_denormal(False)


def two_discs() -> np.ndarray:
    """A subject in both styles: a red disc in a green one, on nothing."""
    down, across = np.mgrid[-1:1:128j, -1:1:128j]
    radius = np.hypot(down, across)
    art = np.zeros((len(STYLES), 128, 128, 4), np.uint8)
    art[:, radius < 0.95] = (40, 160, 60, 255)
    art[:, radius < 0.5] = (200, 30, 30, 255)
    return art


def test_pixel_art_is_squares_of_few_colours_on_the_background_asked_for() -> None:
    """Every square of 16 px has one colour; there are at most the palette's, the outline's and the background's."""
    picture = looks.pixel_art(two_discs(), 512, (245, 150, 195), SPOT)
    squares = picture.reshape(3, 32, CELL, 32, CELL)
    assert (squares == squares[:, :, :1, :, :1]).all()
    assert len(np.unique(picture.reshape(3, -1), axis=1).T) <= looks.COLOURS + 2
    np.testing.assert_allclose((picture[:, 0, 0] + 1) * 127.5, (245, 150, 195), atol=0.01)


def test_line_art_is_a_black_contour_around_greys_on_white_whatever_the_background() -> None:
    """No colour at all; white outside; one black line where the object ends; two greys inside it."""
    picture = looks.line_art(two_discs(), 512, (245, 150, 195), SPOT)
    assert (picture == picture[:1]).all()
    along = picture[0, 256, 256:]
    black = along < -0.9
    assert along[-1] == 1 and black.sum() >= 5 and (np.diff(black.astype(int)) == 1).sum() == 1
    assert len(np.unique(along[:170])) == 2 and along[:170].min() > -0.9


def test_before_training_the_factors_change_nothing_and_only_they_learn() -> None:
    """The first picture estimate is the base model's; no weight of the base is to be learned."""
    student = adapters.Student()
    for name, module in adapters.adapted(student.unet):
        stored = module.parametrizations.weight.original
        assert torch.equal(module.weight, stored) and not stored.requires_grad, name
    learning = {name for name, p in student.unet.named_parameters() if p.requires_grad}
    assert learning and all(".parametrizations.weight.0." in name for name in learning)


def tiny_pool(*_: object) -> pools.Pool:
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    return pools.Pool(latents, np.array([(i, STYLES.index(CAST_STYLE), i) for i in range(6)]))


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> tuple[adapters.Run, list[float]]:
    """Train for four steps on a tiny pool, asked to stop after some."""
    asked = iter(range(100))
    monkeypatch.setattr(adapters, "pool", tiny_pool)
    monkeypatch.setattr(tuning, "asked_to_stop", lambda: next(asked) >= stop_after)
    return adapters.train("pixel-art", adapters.Course(steps=4, batch=2), folder)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two of four steps and started again, it has the same losses and the same factors."""
    whole_run, whole = trained(tmp_path / "whole", monkeypatch, 100)
    _, parts = trained(tmp_path / "parts", monkeypatch, 2)
    assert len(parts) == 2
    run, rest = trained(tmp_path / "parts", monkeypatch, 100)
    assert parts + rest == pytest.approx(whole, rel=1e-5)
    expected = whole_run.learned()
    for name, (down, up) in run.learned().items():
        torch.testing.assert_close(down, expected[name][0])
        torch.testing.assert_close(up, expected[name][1])


def test_a_written_file_does_what_training_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``alpha / rank * up @ down``, read back, is what training added to the weight, to half precision."""
    run, _ = trained(tmp_path, monkeypatch, 100)
    path = tmp_path / "made.safetensors"
    adapter_files.write_lora(path, run.learned(), CARDS["pixel-art"], adapters.ALPHA, run.step)
    tensors = load_file(path)
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    up, down = tensors[f"{stem}.lora_up.weight"].float(), tensors[f"{stem}.lora_down.weight"].float()
    factor = run.average.module["down_blocks/1/attentions/0/transformer_blocks/0/attn2/to_k"]
    expected = (factor.up @ factor.down).detach()
    assert expected.abs().max() > 0
    merged = float(tensors[f"{stem}.alpha"]) / len(down) * up @ down
    torch.testing.assert_close(merged, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_are_small_finite_and_say_what_they_are(name: str) -> None:
    """At most 4 MB, half precision, every module with both factors and alpha, and true metadata."""
    path = LORAS / f"{name}.safetensors"
    assert path.stat().st_size <= adapter_files.LIMIT_BYTES
    tensors = load_file(path)
    stems = {key.split(".")[0] for key in tensors}
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{stem}.{end}" for stem in stems for end in ends}
    assert all(t.dtype == torch.float16 and bool(t.isfinite().all()) for t in tensors.values())
    assert "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_v" in stems
    with safe_open(path, "pt") as file:
        says = file.metadata()
    assert says["ss_base_model_version"] == "impasto-builtin"
    assert says["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert says["modelspec.trigger_phrase"] in json.loads(says["ss_tag_frequency"])[name]
    assert CARDS[name].description in says["modelspec.description"]


def test_the_card_names_every_file() -> None:
    """The README beside the files lists them with their trigger words, and says whose drawings they learned from."""
    card = (LORAS / "README.md").read_text()
    for name in NAMES:
        assert f"`{name}.safetensors` | {CARDS[name].trigger}" in card
    assert "Copyright (c) Microsoft Corporation" in card


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("builtin", dtype="float32", max_batch=1)


@pytest.fixture(scope="module")
def drawn(engine: Engine) -> Callable[[int, str, float], np.ndarray]:
    """Pictures (512, 512, 3) of 0..255 by seed, LoRA and scale; that of scale 0 is drawn once for all LoRAs."""

    @cache
    def picture(seed: int, name: str, scale: float) -> np.ndarray:
        if scale == 0 and name != NAMES[0]:
            return picture(seed, NAMES[0], 0.0)
        request = GenerationRequest(
            prompt="a green cactus on a pink background",
            width=512,
            height=512,
            seed=seed,
            num_inference_steps=10,
            loras=(LoraRef(str(LORAS / f"{name}.safetensors"), scale),),
        )
        return next(np.asarray(e.image, np.float64) for e in engine.generate(request) if isinstance(e, ImageReady))

    return picture


def within_squares(picture: np.ndarray, shift: int) -> float:
    """Variance inside squares of 16 px, on a grid moved by so many pixels."""
    inner = picture[shift : shift + 480, shift : shift + 480].reshape(30, CELL, 30, CELL, 3)
    return float(inner.var((1, 3)).mean())


def smoothness_of_squares(picture: np.ndarray) -> float:
    """Variance inside the squares of the grid against a grid half a square away: 1 where there are no squares."""
    return within_squares(picture, 0) / within_squares(picture, CELL // 2)


def saturation(picture: np.ndarray) -> float:
    """Mean distance between a pixel's largest and smallest channel, 0..255."""
    return float((picture.max(-1) - picture.min(-1)).mean())


def test_the_measure_of_squares_tells_them_from_a_smooth_picture() -> None:
    """0 on pixel art itself, about 1 on a slope."""
    squares = looks.pixel_art(two_discs(), 512, (0, 0, 0), SPOT).transpose(1, 2, 0)
    assert smoothness_of_squares(squares) == pytest.approx(0, abs=1e-6)
    slope = np.mgrid[0:512, 0:512][0][..., None].repeat(3, 2).astype(np.float64)
    assert smoothness_of_squares(slope) == pytest.approx(1)


@pytest.mark.parametrize("seed", [7, 1_000_003])
@pytest.mark.parametrize(
    ("name", "measure", "most"), [("pixel-art", smoothness_of_squares, 0.6), ("line-art", saturation, 0.5)]
)
def test_the_look_grows_with_the_scale(drawn, seed: int, name: str, measure, most: float) -> None:
    """Each step of the scale, 0 to 0.5 to 1, shows more of it; at 1 it is beyond doubt."""
    none, half, whole = (measure(drawn(seed, name, scale)) for scale in (0.0, 0.5, 1.0))
    assert none > half > whole
    assert whole < most * none
