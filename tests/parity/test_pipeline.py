"""Our pictures equal diffusers' StableDiffusionXLPipeline on the same folder and noise.

Tolerance, of the final 8-bit picture: no pixel off by more than 2, and 0.1 on average.
"""

import numpy as np
import pytest
import torch

from impasto.types import GenerationRequest, ImageReady

MAX_DIFFERENCE = 2  # of 255
MEAN_DIFFERENCE = 0.1  # of 255

REQUESTS = {
    "guided": GenerationRequest("a red fox on a blue background", num_inference_steps=6, seed=7),
    "one step": GenerationRequest("a red fox on a blue background", num_inference_steps=1, seed=1),
    "unguided": GenerationRequest("a cat", num_inference_steps=4, guidance_scale=0, seed=11),
    "guidance of 1 is off": GenerationRequest("a cat", num_inference_steps=4, guidance_scale=1, seed=11),
    "negative prompt": GenerationRequest("a cat", "blue background", num_inference_steps=4, seed=5),
    "empty negative prompt": GenerationRequest("a cat", "", num_inference_steps=4, seed=5),
    "wide": GenerationRequest("a rocket", width=768, height=512, num_inference_steps=3, seed=2),
    "off the grid of 64": GenerationRequest("a rocket", width=520, height=648, num_inference_steps=2, seed=2),
    "large seed": GenerationRequest("a pizza", num_inference_steps=2, seed=9_999_999_999),
    "a full window": GenerationRequest("a b c d e " * 15, num_inference_steps=2, seed=3),
}


def sized(request: GenerationRequest) -> GenerationRequest:
    """The same request at the smallest size, unless it is about sizes."""
    data = request.to_json()
    if request.width == request.height == 1024:
        data |= {"width": 512, "height": 512}
    return GenerationRequest.from_json(data)


def theirs(pipeline, request: GenerationRequest) -> np.ndarray:
    """What diffusers makes of the request."""
    return np.asarray(
        pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
        ).images[0]
    )


def ours(engine, request: GenerationRequest) -> list[np.ndarray]:
    """What our engine makes of it, image by image."""
    events = engine.generate(request)
    return [np.asarray(event.image) for event in events if isinstance(event, ImageReady)]


def assert_same_picture(a: np.ndarray, b: np.ndarray) -> None:
    difference = np.abs(a.astype(int) - b.astype(int))
    assert a.shape == b.shape
    assert difference.max() <= MAX_DIFFERENCE
    assert difference.mean() <= MEAN_DIFFERENCE


@pytest.mark.parametrize("name", REQUESTS)
def test_the_picture_equals_diffusers(engine, pipeline, name):
    """Text to image with guidance on and off, negative prompts, sizes, seeds: the same picture as diffusers."""
    request = sized(REQUESTS[name])

    [picture] = ours(engine, request)

    assert_same_picture(picture, theirs(pipeline, request))
    assert picture.std() > 1, "a flat picture would equal anything flat"


def test_the_comparison_can_fail(engine, pipeline):
    """Another seed is another picture by far: the tolerance is no rubber stamp."""
    request = sized(REQUESTS["guided"])
    [picture] = ours(engine, GenerationRequest.from_json(request.to_json() | {"seed": 8}))

    with pytest.raises(AssertionError):
        assert_same_picture(picture, theirs(pipeline, request))


def test_image_i_is_the_picture_of_seed_plus_i(engine, pipeline):
    """Three images in one batch are the three pictures diffusers makes from seeds 20, 21 and 22."""
    request = GenerationRequest("a frog", width=512, height=512, num_inference_steps=3, num_images=3, seed=20)

    pictures = ours(engine, request)

    for i, picture in enumerate(pictures):
        single = GenerationRequest.from_json(request.to_json() | {"seed": 20 + i, "num_images": 1})
        assert_same_picture(picture, theirs(pipeline, single))
    assert len(pictures) == 3


def test_absent_and_empty_negative_prompts_differ(engine):
    """Absent means zeros, empty means the embedding of nothing: two pictures."""
    absent, empty = (
        sized(GenerationRequest("a cat", seed=5, num_inference_steps=4)),
        sized(REQUESTS["empty negative prompt"]),
    )

    [a], [b] = ours(engine, absent), ours(engine, empty)

    assert np.abs(a.astype(int) - b.astype(int)).mean() > MEAN_DIFFERENCE
