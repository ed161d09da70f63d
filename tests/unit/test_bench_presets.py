"""The benchmark of accelerations: its sums are the engine's own calls, and its differences are differences."""

from collections import Counter
from functools import partialmethod

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.presets import Drawn, Kind, calls_of, compare, operations, psnr_db, sheet
from benchmarks.weights import SIZES
from impasto.engine.engine import Engine
from impasto.engine.pace import Pace, pace_of
from impasto.models.denoiser import Denoiser
from impasto.types import ACCELERATIONS, GenerationRequest
from tests.random_sdxl import save_random_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine.load(str(save_random_sdxl(tmp_path_factory.mktemp("models") / "m")), device="cpu", dtype="float32")


def made(engine: Engine, monkeypatch, request: GenerationRequest) -> Counter[Kind]:
    """The calls that the engine makes of its network for a request."""
    found: Counter[Kind] = Counter()
    for name, depth in (("predict", "plain"), ("predict_keeping", "keeping"), ("predict_shallow", "shallow")):

        def noting(self, latents, *given, inner, depth):
            found[Kind(depth, len(latents))] += 1
            return inner(self, latents, *given)

        monkeypatch.setattr(Denoiser, name, partialmethod(noting, inner=getattr(Denoiser, name), depth=depth))
    list(engine.generate(request))
    return found


@pytest.mark.parametrize(
    "fields",
    [*({"acceleration": name} for name in ACCELERATIONS), {"guidance_end": 0.6},
     {"acceleration": "fast", "guidance_end": 0.5}, {"reuse_features": 4, "guidance_start": 0.3}],
)  # fmt: skip
def test_the_calls_that_are_added_up_are_those_that_the_engine_makes(engine, monkeypatch, fields):
    """By kind and number; otherwise a composed time would be of another picture."""
    request = GenerationRequest("a fox", width=64, height=64, num_inference_steps=STEPS, **fields)
    assert calls_of(pace_of(request), STEPS) == made(engine, monkeypatch, request)


@pytest.fixture(scope="module")
def work() -> dict[str, float]:
    """Operations of a row of the full size's calls at 512 px, counted without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES["full"]["unet"])
    return operations(unet.config, 512)


def test_a_shallow_call_of_the_full_size_is_a_fifteenth(work):
    """Of a whole one's operations."""
    assert work["plain"] == work["keeping"] == pytest.approx(1.589e12, rel=2e-3)
    assert work["shallow"] / work["plain"] == pytest.approx(0.0704, rel=0.01)


def test_balanced_saves_what_it_must_on_the_full_size(work):
    """At least 1.8 times as fast over thirty steps by operations, and fast is faster."""
    totals = [
        sum(n * kind.rows * work[kind.depth] for kind, n in calls_of(pace_of(asked), STEPS).items())
        for asked in (GenerationRequest("x", num_inference_steps=STEPS, acceleration=name) for name in ACCELERATIONS)
    ]
    exact, balanced, fast = totals
    assert exact == pytest.approx(2 * STEPS * work["plain"])
    assert balanced <= exact / 1.8 and fast <= 0.85 * balanced


def test_without_any_reuse_no_features_are_kept():
    """A pace that only limits guidance makes plain calls."""
    assert calls_of(Pace(guidance_end=0.5), 10) == {Kind("plain", 2): 5, Kind("plain", 1): 5}


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (level,) * 3)


def test_differences_are_measured_against_the_exact_pictures():
    """16 levels of 255 are 24 dB; the same picture has none; times are ratios of pairs."""
    assert psnr_db(grey(100), grey(100)) is None
    assert psnr_db(grey(100), grey(116)) == pytest.approx(10 * np.log10(255**2 / 16**2))
    exact, other = [Drawn(grey(100), 6.0), Drawn(grey(50), 6.0)], [Drawn(grey(116), 2.0), Drawn(grey(51), 3.0)]
    row = compare(other, exact)
    assert (row["times_exact"], row["psnr_db_worst"], row["pixel_mean"]) == (2.5, 24.0, 8.5)
    assert compare(exact, exact)["psnr_db"] is None


def test_the_figure_has_a_row_for_each_picture_and_a_column_for_each_preset():
    """Pictures stand where their words are."""
    made_of = {"exact": [Drawn(grey(100), 6.0)] * 2, "fast": [Drawn(grey(200), 2.0)] * 2}
    figure = np.asarray(sheet(made_of))
    assert (figure[200, 100] == 100).all() and (figure[200, 400] == 200).all()
    assert figure.shape[1] == 512 and (figure[-1, -1] == 200).all()
