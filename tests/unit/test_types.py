"""Requests: every range is checked where the value is made, and JSON carries them without loss."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.errors import InvalidInput
from impasto.types import (
    LIMITS,
    SCHEDULER_ALIASES,
    SCHEDULERS,
    GenerationRequest,
    LoraRef,
    parse_size,
    scheduler_name,
    seed_of_image,
)

SIDES = st.integers(64, 192).map(lambda cells: cells * 8)
REQUESTS = st.builds(
    GenerationRequest,
    prompt=st.text(min_size=1, max_size=50).filter(str.strip),
    negative_prompt=st.none() | st.text(max_size=20),
    width=SIDES,
    height=SIDES,
    num_inference_steps=st.integers(1, 50),
    guidance_scale=st.floats(0, 20),
    num_images=st.integers(1, 4),
    seed=st.integers(-1, 9_999_999_999),
    scheduler=st.sampled_from(SCHEDULERS),
    guidance_rescale=st.floats(0, 1),
    loras=st.lists(st.builds(LoraRef, st.text(min_size=1), st.floats(0, 4)), max_size=5).map(tuple),
)


@given(REQUESTS)
def test_a_request_survives_json(request):
    """What goes into the job store comes out the same."""
    assert GenerationRequest.from_json(request.to_json()) == request


BROKEN = {
    "prompt": ["", "   ", "x" * (LIMITS.max_prompt_chars + 1)],
    "negative_prompt": ["x" * (LIMITS.max_prompt_chars + 1)],
    "width": [56, 4104, 513, 0, -512],
    "height": [56, 4104, 513],
    "num_inference_steps": [0, 51, -1],
    "guidance_scale": [-0.1, 20.1, float("nan"), float("inf")],
    "num_images": [0, 5],
    "seed": [-2, 10_000_000_000],
    "loras": [(LoraRef("a"),) * 6],
    "scheduler": ["", "Euler", "nonsense"],
    "guidance_rescale": [-0.1, 1.1],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BROKEN.items() for value in values])
def test_each_range_is_enforced_and_named(field, value):
    """A value past either end is refused with the field's own name."""
    with pytest.raises(InvalidInput, match=field) as caught:
        GenerationRequest(**({"prompt": "a fox"} | {field: value}))
    assert caught.value.field == field
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 512), ("width", 1536), ("height", 520), ("num_inference_steps", 1), ("num_inference_steps", 50),
        ("guidance_scale", 0), ("guidance_scale", 20), ("num_images", 4), ("seed", -1), ("seed", 9_999_999_999),
        ("loras", (LoraRef("a"),) * 5), ("negative_prompt", ""),
    ],
)  # fmt: skip
def test_the_ends_of_each_range_are_inside(field, value):
    """Limits are inclusive."""
    assert getattr(GenerationRequest(**({"prompt": "a fox"} | {field: value})), field) == value


@pytest.mark.parametrize("text", ["768*1024", "768x1024", "768X1024", " 768 * 1024 ", "768×1024"])
def test_sizes_are_width_then_height(text):
    """All spellings of a size mean the same."""
    assert parse_size(text) == (768, 1024)


@pytest.mark.parametrize("text", ["", "1024", "1024*", "*1024", "1024*1024*3", "10.5*10", "-512*512", "a*b", "512*9e9"])
def test_a_malformed_size_says_what_one_looks_like(text):
    """The message shows the form."""
    with pytest.raises(InvalidInput, match=r"1024\*1024"):
        parse_size(text)


@pytest.mark.parametrize("text", ["504*1024", "1024*1544", "1024*1001"])
def test_a_size_out_of_range_names_the_field(text):
    """Range and grid are checked for either side."""
    with pytest.raises(InvalidInput, match="size must be"):
        parse_size(text)


def test_every_alias_of_a_scheduler_leads_to_one():
    """Other tools' spellings are lower case here and mean something."""
    assert set(SCHEDULER_ALIASES.values()) <= set(SCHEDULERS)
    assert all(alias == alias.lower() and alias not in SCHEDULERS for alias in SCHEDULER_ALIASES)


@pytest.mark.parametrize(
    ("text", "name"), [("K_EULER", "euler"), ("DPM++ 2M Karras", "dpmpp_2m_karras"), (" ddim ", "ddim"), ("LCM", "lcm")]
)
def test_schedulers_are_found_by_any_spelling(text, name):
    """Other services' names and ours, upper or lower case."""
    assert scheduler_name(text) == name


def test_an_unknown_scheduler_lists_the_known_ones():
    """The message is the help."""
    with pytest.raises(InvalidInput, match=r"scheduler must be one of euler, .* got 'magic'"):
        scheduler_name("magic")


def test_the_seed_of_every_image_can_be_asked_for():
    """Past the largest seed they start again from 0."""
    assert [seed_of_image(7, i) for i in range(3)] == [7, 8, 9]
    assert [seed_of_image(9_999_999_999, i) for i in range(3)] == [9_999_999_999, 0, 1]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_lora_scale_is_a_finite_number(scale):
    """Anything else would make every picture black."""
    with pytest.raises(InvalidInput, match="finite"):
        LoraRef("a", scale)


def test_a_number_beyond_floats_is_refused_like_any_other():
    """No overflow inside the check."""
    with pytest.raises(InvalidInput, match="seed must be between -1 and 9999999999, got 1000"):
        GenerationRequest("a fox", seed=10**400)
