"""What benchmarks compute rather than time: counted work, percentiles, loads, and models written for them."""

import argparse

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import roofline
from benchmarks.baselines.one_by_one import Done, OneByOne
from benchmarks.throughput import Arrival, Served, arrivals, named, summary
from benchmarks.weights import SIZES, filled, model_folder
from impasto.engine.engine import Engine
from impasto.types import GenerationRequest, ImageReady

TERA = 1e12


@pytest.mark.parametrize(("side", "tflop"), [(512, 1.589), (1024, 6.761)])
def test_a_step_of_the_full_size_is_counted_as_published(side, tflop):
    """Multiply and add are two operations; the figures are those of an independent count."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES["full"]["unet"])
    assert roofline.unet_operations(unet.config, side, rows=1) / TERA == pytest.approx(tflop, rel=2e-3)


def test_the_roofline_line_is_a_share_of_a_measured_peak():
    """Work done in the time that the peak needs for it is all of the peak."""
    peak = roofline.measured_peak("cpu", torch.float32)
    line = roofline.line(peak, 1.0, "cpu", torch.float32)
    assert line["share_of_peak"] == 1
    assert roofline.line(peak, 2.0, "cpu", torch.float32)["share_of_peak"] == pytest.approx(0.5)


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**({"seed": 1, "requests": 400, "sizes": [256], "steps": [4, 8]} | changes))


def test_arrivals_come_at_the_asked_rate_and_are_the_same_every_time(tmp_path):
    """Both sides get the same requests; without a rate all come at once."""
    files = [tmp_path / "a", tmp_path / "b"]
    load = arrivals(options(), files, rate=2.0)
    assert load == arrivals(options(), files, rate=2.0)
    assert load[-1].seconds == pytest.approx(200, rel=0.2)
    assert {arrival.loras[0] for arrival in load} == set(files)
    assert all(arrival.seconds == 0 for arrival in arrivals(options(), files, rate=None))


def test_rates_and_waits_of_a_load_are_counted_from_arrivals():
    """Two requests, the second a second later, both begun two seconds after they came and done three after."""
    request = GenerationRequest("a fox")
    load = [Arrival(0.0, request, ()), Arrival(1.0, request, ())]
    served = Served({n: Done(102.0 + n, 103.0 + n) for n in range(2)}, calls=[1, 2, 2, 1], started=100.0)
    figures = summary(load, served)
    assert (figures["seconds"], figures["images_per_s"], figures["occupancy"]) == (4.0, 0.5, 1.5)
    assert (figures["latency_p95"], figures["wait_p50"]) == (3.0, 2.0)


def test_more_sets_than_files_are_further_names_of_them(tmp_path):
    """Each name is a file of its own to whoever caches by name."""
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.safetensors")
        files[-1].write_text(name)
    names = named(files, 5, tmp_path)
    assert len(set(names)) == 5
    assert [path.read_text() for path in names] == ["a", "b", "a", "b", "a"]


class Pipeline:
    """Notes what it is asked to do."""

    def __init__(self):
        self.log = []

    def wear(self, loras):
        self.log.append(tuple(loras))

    def draw(self, request):
        self.log.append(request.seed)


def test_the_baseline_runs_requests_in_order_and_keeps_loras_that_are_on_already():
    """Loaded once for neighbours that share them, unloaded at the end."""
    pipeline = Pipeline()
    server = OneByOne(pipeline)
    for number, loras in enumerate([("a",), ("a",), ("b",)]):
        server.submit(number, GenerationRequest("a fox", seed=number), loras)
    server.close()
    assert pipeline.log == [("a",), 0, 1, ("b",), 2, ()]
    assert server.done[0].ended <= server.done[1].began


def test_a_written_model_is_one_that_the_engine_runs(tmp_path):
    """Random weights of reduced width make a finite picture, and are written once."""
    folder = model_folder("reduced", tmp_path)
    engine = Engine.load(folder, dtype="bfloat16")
    request = GenerationRequest("a fox", width=64, height=64, num_inference_steps=1)
    pictures = [event.image for event in engine.generate(request) if isinstance(event, ImageReady)]
    assert [picture.size for picture in pictures] == [(64, 64)]
    written = (tmp_path / "reduced" / "model_index.json").stat().st_mtime_ns
    assert model_folder("reduced", tmp_path) == folder
    assert (tmp_path / "reduced" / "model_index.json").stat().st_mtime_ns == written


def test_random_weights_keep_numbers_near_one():
    """Norms pass, biases are zero, matrices are scaled by what comes in."""
    network = filled(lambda: torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.LayerNorm(64)), dtype=torch.float32)
    given = torch.randn(100, 256, generator=torch.Generator().manual_seed(1))
    assert network[0](given).std().item() == pytest.approx(1, abs=0.3)
    assert (network[0].bias == 0).all() and (network[1].weight == 1).all()
