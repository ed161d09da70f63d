"""Accelerations: what each leaves out, that a request's own values win, and that old rows mean what they meant."""

import numpy as np
import pytest

from impasto.engine.batch import Row
from impasto.engine.engine import Engine
from impasto.engine.pace import PRESETS, Pace, pace_of
from impasto.errors import InvalidInput
from impasto.types import ACCELERATIONS, SCHEDULERS, GenerationRequest, ImageReady
from tests.random_sdxl import save_random_refiner, save_random_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 30


def request(**fields) -> GenerationRequest:
    return GenerationRequest(
        **({"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": STEPS, "seed": 1} | fields)
    )


def wholes(pace: Pace, total: int, first: int = 0) -> list[int]:
    """The calls that compute their own features."""
    return [call for call in range(first, total) if pace.whole(call, first, total)]


def test_there_is_a_preset_for_every_acceleration_and_exact_leaves_nothing_out():
    """The table and the words of requests are the same."""
    assert tuple(PRESETS) == ACCELERATIONS
    assert pace_of(request()) == Pace() == pace_of(request(acceleration="exact"))
    assert wholes(Pace(), 7) == list(range(7)) and Pace().guides(0) and Pace().guides(0.999)


def test_features_are_reused_from_the_end_of_the_warm_up_on():
    """The first steps decide what stands where, so each of them is whole; then one of every few."""
    assert wholes(Pace(reuse=3, warm=0.2), 20) == [0, 1, 2, 3, 4, 7, 10, 13, 16, 19]
    assert wholes(Pace(reuse=3), 7) == [0, 3, 6]


def test_a_start_picture_counts_from_where_it_starts():
    """Past the warm-up the first call that is made is whole, whatever its number."""
    assert wholes(Pace(reuse=3, warm=0.2), 20, first=11) == [11, 14, 17]
    assert wholes(Pace(reuse=3, warm=0.5), 20, first=8) == [8, 9, 10, 13, 16, 19]


@pytest.mark.parametrize("acceleration", ["balanced", "fast"])
def test_with_few_steps_nothing_is_reused(acceleration):
    """Neighbouring steps differ too much: models that need four steps are left alone."""
    preset = PRESETS[acceleration]
    assert [preset.reuse(steps) for steps in range(1, 9)] == [1] * 8
    assert 2 <= preset.reuse(STEPS) <= preset.reuse(50) <= 10


def test_fast_leaves_out_more_than_balanced():
    """Fewer whole calls, or fewer guided ones, and never more of either."""
    counts = []
    for acceleration in ACCELERATIONS:
        pace = pace_of(request(acceleration=acceleration))
        counts.append((len(wholes(pace, STEPS)), sum(pace.guides(call / STEPS) for call in range(STEPS))))
    exact, balanced, fast = counts
    assert exact == (STEPS, STEPS)
    assert balanced[0] < exact[0] and fast < balanced and fast[1] <= balanced[1] <= exact[1]


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
@pytest.mark.parametrize(
    ("field", "value", "name"),
    [("reuse_features", 1, "reuse"), ("reuse_features", 7, "reuse"), ("guidance_start", 0.3, "guidance_start"),
     ("guidance_start", 0.0, "guidance_start"), ("guidance_end", 1.0, "guidance_end"),
     ("guidance_end", 0.35, "guidance_end")],
)  # fmt: skip
def test_what_a_request_says_itself_wins(acceleration, field, value, name):
    """Also where it is the plain way's value; the rest stays the acceleration's."""
    own, whole = (pace_of(request(acceleration=acceleration, **given)) for given in ({field: value}, {}))
    assert getattr(own, name) == value
    others = {"reuse", "warm", "guidance_start", "guidance_end"} - {name}
    assert {other: getattr(own, other) for other in others} == {other: getattr(whole, other) for other in others}


@pytest.mark.parametrize("field", ["acceleration", "guidance_start", "guidance_end", "reuse_features"])
def test_rows_of_before_mean_what_they_meant(field):
    """Rows without the field are exact, as are those that state the old defaults; what is given survives."""
    old = request().to_json() | {"guidance_start": 0.0, "guidance_end": 1.0, "reuse_features": 1}
    del old[field]
    assert pace_of(GenerationRequest.from_json(old)) == Pace()
    given = request(acceleration="fast", guidance_end=0.5, reuse_features=2)
    assert GenerationRequest.from_json(given.to_json()) == given


def test_an_old_row_of_a_video_is_still_one():
    """Rows stored the plain number of steps that share features; only more of them is refused."""
    old = request().to_json() | {"reuse_features": 1, "animation": {"frames": 8, "fps": 8}}
    assert GenerationRequest.from_json(old).reuse_features == 1


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [("acceleration", "turbo", "must be one of exact, balanced, fast"), ("acceleration", None, "must be one of"),
     ("reuse_features", 0, "must be between 1 and 10"), ("reuse_features", 2.0, "must be a whole number"),
     ("guidance_end", 1.1, "must be between 0 and 1"), ("guidance_start", -0.1, "must be between 0 and 1")],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(field, value, problem):
    """The message names the field."""
    with pytest.raises(InvalidInput, match=f"^{field} {problem}"):
        request(**{field: value})


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    root = tmp_path_factory.mktemp("models")
    base, refiner = save_random_sdxl(root / "base"), save_random_refiner(root / "refiner")
    return Engine.load(str(base), refiner=str(refiner), device="cpu", dtype="float32")


def picture(engine: Engine, asked: GenerationRequest) -> np.ndarray:
    [found] = [event.image for event in engine.generate(asked) if isinstance(event, ImageReady)]
    return np.asarray(found).astype(int)


def calls_of(engine: Engine, monkeypatch, asked: GenerationRequest) -> list[tuple[bool, bool]]:
    """Whether each call of a picture was whole, and whether it was guided."""
    seen: list[tuple[bool, bool]] = []
    advance = Row.advance
    monkeypatch.setattr(
        Row, "advance", lambda row, move: (seen.append((not row.shallow, row.guided)), advance(row, move))[1]
    )
    list(engine.generate(asked))
    monkeypatch.setattr(Row, "advance", advance)
    return seen


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_the_engine_keeps_the_pace_of_the_table(engine, monkeypatch, acceleration):
    """The calls that are made are those that the table says."""
    asked = request(acceleration=acceleration)
    pace = pace_of(asked)
    expected = [(pace.whole(call, 0, STEPS), pace.guides(call / STEPS)) for call in range(STEPS)]
    assert calls_of(engine, monkeypatch, asked) == expected


def test_an_acceleration_is_what_its_values_are(engine):
    """Exact by name is exact by default, to the bit; fast is another picture, and not a broken one."""
    exact = picture(engine, request())
    assert (picture(engine, request(acceleration="exact")) == exact).all()
    assert (picture(engine, request(acceleration="fast", **EXACT)) == exact).all()
    for acceleration in ("balanced", "fast"):
        assert 0 < np.abs(picture(engine, request(acceleration=acceleration)) - exact).mean() < 40


EXACT = {"reuse_features": 1, "guidance_start": 0.0, "guidance_end": 1.0}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_goes_with_fast(engine, scheduler):
    """Samplers of two calls a step and those with a memory as well."""
    assert picture(engine, request(acceleration="fast", scheduler=scheduler, num_inference_steps=13)).std() > 1


@pytest.mark.parametrize("refine", ["expert_ensemble_refiner", "base_image_refiner"])
def test_a_refiner_goes_with_fast(engine, refine):
    """Features of one network are never given to the other."""
    assert picture(engine, request(acceleration="fast", refine=refine)).std() > 1
