"""Pictures do not depend on what runs beside them: twenty requests of all kinds at once equal each run alone."""

from dataclasses import replace

import numpy as np
import pytest

from impasto.engine.engine import Engine
from impasto.types import Failed, GenerationRequest, ImageReady
from tests.parity.modes import asked
from tests.random_sdxl import save_random_inpaint, save_random_refiner, save_random_sdxl

MAX_DIFFERENCE = 1  # of 255, float32 on the CPU
HALF_DIFFERENCE = {"bfloat16": 24, "float16": 6}  # of 255: the network's own rounding, as batches round differently

TWENTY = [  # mode and what is special
    ("text-to-image", {"num_inference_steps": 30, "scheduler": "dpmpp_2m_karras", "acceleration": "fast"}),
    ("text-to-image", {"num_inference_steps": 1}),
    ("text-to-image", {"guidance_scale": 0, "scheduler": "euler_a"}),
    ("text-to-image", {"guidance_scale": 1, "scheduler": "lcm", "num_inference_steps": 4}),
    ("text-to-image", {"guidance_rescale": 0.7, "scheduler": "ddim"}),
    ("text-to-image", {"num_images": 4, "scheduler": "heun"}),
    ("text-to-image", {"guidance_start": 0.2, "guidance_end": 0.7}),
    ("text-to-image", {"reuse_features": 3, "num_inference_steps": 9}),
    ("text-to-image", {"prompt": "a b c d e f " * 30, "negative_prompt": "blue"}),
    ("text-to-image", {"prompt": "a (red:1.4) fox", "prompt_syntax": "weighted"}),
    ("image-to-image", {"strength": 0.3, "num_inference_steps": 20}),
    ("image-to-image", {"strength": 0.01, "scheduler": "unipc"}),
    ("image-to-image", {"strength": 1.0, "scheduler": "dpmpp_sde", "num_images": 2}),
    ("inpainting", {"strength": 0.5}),
    ("inpainting", {"strength": 1.0, "scheduler": "dpmpp_2m_sde"}),
    ("ensemble", {"num_inference_steps": 10}),
    ("ensemble", {"high_noise_frac": 0.3, "scheduler": "tcd"}),
    ("second pass", {"refine_steps": 20}),
    ("second pass", {"guidance_scale": 0, "scheduler": "pndm"}),
    ("inpainting", {"refine": "base_image_refiner", "negative_prompt": ""}),
]


def requests() -> list[GenerationRequest]:
    """The twenty, with seeds and sizes of their own."""
    sizes = [(64, 64), (64, 64), (96, 64)]
    found = []
    for i, (mode, values) in enumerate(TWENTY):
        width, height = sizes[i % len(sizes)]
        found.append(asked(mode, **{"num_inference_steps": 6, "width": width, "height": height, "seed": i} | values))
    return found


def pictures(engine: Engine, wanted: list[GenerationRequest], *, together: bool) -> list[list[np.ndarray]]:
    """Run requests, all in flight at once or one after another; the third joins late in either case.

    Whoever is ready shares calls, whatever calls were measured to take: batches are what is compared.
    """
    engine._costs.share = lambda size, ready: ready
    found: dict[str, dict[int, np.ndarray]] = {str(i): {} for i in range(len(wanted))}

    def collect(events) -> None:
        for event in events:
            assert not isinstance(event, Failed), event
            if isinstance(event, ImageReady):
                found[event.request_id][event.index] = np.asarray(event.image)

    for i, request in enumerate(wanted):
        engine.submit(request, str(i))
        if not together:
            while engine.busy:
                collect(engine.step())
        elif i % 3 == 0:
            collect(engine.step())  # so that the next ones join rows under way
    while engine.busy:
        collect(engine.step())
    return [[images[k] for k in sorted(images)] for images in found.values()]


def largest(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> list[int]:
    """Largest pixel difference of each request."""
    return [
        max(int(np.abs(x.astype(int) - y.astype(int)).max()) for x, y in zip(one, other, strict=True))
        for one, other in zip(a, b, strict=True)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("together")
    return save_random_sdxl(root / "base"), save_random_refiner(root / "refiner"), save_random_inpaint(root / "inpaint")


def load(folders, dtype: str, max_batch: int = 8) -> Engine:
    base, refiner, _ = folders
    return Engine.load(str(base), refiner=str(refiner), device="cpu", dtype=dtype, max_batch=max_batch)


def test_twenty_mixed_requests_equal_each_alone(folders):
    """All modes, 1 to 30 steps, guided and not, in calls of up to eight: within 1 of 255."""
    wanted = requests()
    engine = load(folders, "float32")

    together, alone = pictures(engine, wanted, together=True), pictures(engine, wanted, together=False)

    assert max(largest(together, alone)) <= MAX_DIFFERENCE
    assert all(picture.std() > 1 for images in together for picture in images), "flat pictures would equal anything"


@pytest.mark.parametrize("dtype", HALF_DIFFERENCE)
def test_in_half_precision_the_difference_is_bounded(folders, dtype):
    """A batch of another size may round another way; samplers and guidance stay in float32."""
    wanted = [request for request in requests() if request.num_inference_steps <= 10]
    engine = load(folders, dtype)

    together, alone = pictures(engine, wanted, together=True), pictures(engine, wanted, together=False)

    assert max(largest(together, alone)) <= HALF_DIFFERENCE[dtype]


def test_rows_really_share_calls(folders, monkeypatch):
    """The comparison is of batches: several rows go through the network at once, base and refiner alike."""
    engine = load(folders, "float32")
    sizes = {"base": [], "refiner": []}
    for stage, denoiser in (("base", engine._model.base), ("refiner", engine._model.refiner)):
        forward = denoiser.unet.forward

        def count(sample, *args, stage=stage, forward=forward, **kwargs):
            sizes[stage].append(len(sample))
            return forward(sample, *args, **kwargs)

        monkeypatch.setattr(denoiser.unet, "forward", count)

    small = {"width": 64, "height": 64}
    modes = ["ensemble", "second pass", "image-to-image", "text-to-image"]
    pictures(
        engine, [asked(mode, **small, num_inference_steps=9, seed=i) for i, mode in enumerate(2 * modes)], together=True
    )

    assert max(sizes["base"]) > 4
    assert max(sizes["refiner"]) > 2


def test_an_inpainting_network_serves_every_mode_in_one_batch(folders):
    """Nine channels: with a mask, without one, and from text alone, each as if it ran alone."""
    engine = Engine.load(str(folders[2]), device="cpu", dtype="float32", max_batch=8)
    small = {"width": 64, "height": 64, "num_inference_steps": 5}
    wanted = [asked(mode, **small, seed=i) for i, mode in enumerate(["text-to-image", "image-to-image", "inpainting"])]

    together, alone = pictures(engine, wanted, together=True), pictures(engine, wanted, together=False)

    assert max(largest(together, alone)) <= MAX_DIFFERENCE


def test_the_comparison_can_fail(folders):
    """Another seed is another picture."""
    engine = load(folders, "float32")
    [request] = requests()[:1]
    one = pictures(engine, [request], together=False)
    other = pictures(engine, [replace(request, seed=99)], together=False)
    assert largest(one, other)[0] > MAX_DIFFERENCE
