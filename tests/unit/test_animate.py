"""The animator's promises, on the built-in model: videos begin with their picture, move, and never touch pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter
from PIL import Image
from safetensors.torch import load_file, save_file

from impasto.animate.animator import Animator
from impasto.animate.clip import SHARED_NOISE, clip_noise
from impasto.animate.motions import LOOPS, moved
from impasto.animate.network import ANIMATEDIFF, VideoNetwork, schedule_of
from impasto.animate.turns import TakingTurns
from impasto.engine.conditioning import Embedding, size_ids
from impasto.engine.engine import Engine
from impasto.engine.latents import seeded
from impasto.engine.parts import parts_of
from impasto.errors import InvalidInput, ModelError
from impasto.models import motion
from impasto.models.catalog import BUILTIN_FOLDER, motion_adapter
from impasto.models.motion import BUILTIN_MOTION, find_adapter, load_adapter, with_motion
from impasto.types import (
    MOTIONS,
    Animation,
    Failed,
    Finished,
    GenerationRequest,
    ImageReady,
    LoraRef,
    Preview,
    Progress,
    VideoReady,
)
from tests.random_sdxl import save_random_sdxl

SIDE = 64  # pixels: eight latents, so that a step takes a moment
WIDTHS = (32, 64, 128)
FRAMES = 8


def save_adapter(folder: Path, loud: float = 0.0, **other: Any) -> Path:
    """An adapter for the built-in model; at ``loud`` 0 it changes nothing."""
    torch.manual_seed(3)
    config = {"block_out_channels": WIDTHS, "motion_num_attention_heads": 4, "motion_norm_num_groups": 8} | other
    adapter = MotionAdapter(**config)
    state = {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}
    for name in state:
        if ".proj_out." in name:
            state[name] = loud * torch.randn(state[name].shape)
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    said = {name: value for name, value in adapter.config.items() if not name.startswith("_")}
    (folder / "config.json").write_text(json.dumps(said | {"_class_name": "MotionAdapter"}))
    schedule = (BUILTIN_FOLDER / "scheduler" / "scheduler_config.json").read_text()
    (folder / "scheduler_config.json").write_text(schedule)
    return folder


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that changes nothing."""
    return str(save_adapter(tmp_path_factory.mktemp("adapters") / "quiet"))


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter with random weights."""
    return str(save_adapter(tmp_path_factory.mktemp("adapters") / "loud", 0.2))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("builtin", device="cpu", dtype="float32", max_batch=2)


def start_picture() -> Image.Image:
    """A red square on blue."""
    picture = Image.new("RGB", (SIDE, SIDE), (50, 110, 225))
    picture.paste((220, 45, 45), (16, 16, 48, 48))
    return picture


EIGHT = Animation(FRAMES, 8)


def request(animation: Animation | None = EIGHT, **fields: Any) -> GenerationRequest:
    small = {"prompt": "a frog", "width": SIDE, "height": SIDE, "num_inference_steps": 4, "seed": 5, "strength": 0.75}
    return GenerationRequest(**(small | {"image": start_picture(), "animation": animation} | fields))


def video(animator: Animator, **fields: Any) -> np.ndarray:
    """The frames of a video, ``[F, H, W, 3]``."""
    [made] = [event for event in animator.animate(request(**fields)) if isinstance(event, VideoReady)]
    return np.stack([np.asarray(frame) for frame in made.frames]).astype(int)


def test_a_video_tells_its_steps_then_its_frames_then_that_it_is_finished(engine: Engine, loud: str) -> None:
    """The events are those of a picture, with one video in place of the pictures."""
    events = list(Animator(engine, loud).animate(request(), preview_every=1))
    shown = [event for event in events if isinstance(event, Preview)]
    told = [event for event in events if not isinstance(event, Preview)]
    assert [type(event) for event in told] == [Progress, Progress, Progress, VideoReady, Finished]
    assert [(event.step, event.total) for event in told[:3]] == [(1, 3), (2, 3), (3, 3)]  # type: ignore[union-attr]
    made = told[3]
    assert isinstance(made, VideoReady) and (made.seed, made.fps, len(made.frames)) == (5, 8, FRAMES)
    assert {frame.size for frame in made.frames} == {(SIDE, SIDE)}
    assert [event.step for event in shown] == [1, 2]


def test_the_first_frame_is_the_start_picture_as_the_autoencoder_has_it(engine: Engine, loud: str) -> None:
    """Whatever prompt, adapter and strength do to the other frames."""
    vae = parts_of(engine).model.vae
    with torch.inference_mode():
        pixels = torch.from_numpy(np.asarray(start_picture()).copy()).permute(2, 0, 1) / 127.5 - 1
        there_and_back = vae.decode(vae.encode(pixels)[0]).numpy().astype(int)
    for strength in (0.3, 1.0):
        frames = video(Animator(engine, loud), strength=strength)
        assert np.abs(frames[0] - there_and_back).max() <= 1
        assert np.abs(frames[1:] - there_and_back).max() > 10


def middle_of(frame: np.ndarray) -> tuple[float, float]:
    """Where the red square is, right and down."""
    red = np.clip(frame[..., 0] - frame[..., 2], 0, None).astype(float)
    down, right = np.indices(red.shape)
    return float((right * red).sum() / red.sum()), float((down * red).sum() / red.sum())


LOOP = np.arange(FRAMES) / FRAMES


@pytest.mark.parametrize(
    ("way", "axis", "path"), [("bounce", 1, np.sin(np.pi * LOOP)), ("move", 0, np.sin(2 * np.pi * LOOP))]
)
def test_a_motion_takes_the_picture_along_and_back(engine: Engine, quiet: str, way: Any, axis: int, path: Any) -> None:
    """At a low strength the square is where the motion has it: up and down again, or left and right."""
    animator = Animator(engine, quiet)
    frames, still = (video(animator, animation=Animation(FRAMES, 8, of), strength=0.3) for of in (way, "none"))
    places = np.array([middle_of(frame)[axis] for frame in frames])
    assert np.corrcoef(places, -path)[0, 1] > 0.95
    assert np.ptp(places) > 5
    assert np.ptp([middle_of(frame) for frame in still], axis=0).max() < 3


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 12)])
def test_every_motion_begins_at_rest_and_comes_back_after_a_loop(height: int, width: int) -> None:
    """A second, or eight frames where that is longer; without motion nothing is interpolated."""
    picture = torch.randn(4, height, width, generator=seeded(0))
    for name in LOOPS:
        frames = moved(picture, name, 32, 16)
        assert torch.equal(frames[0], picture)
        assert torch.allclose(frames[16], picture, atol=1e-4) and torch.allclose(frames[17], frames[1])
        assert name == "none" or (frames[4] - picture).abs().max() > 0.1
    assert torch.allclose(moved(picture, "pulse", 9, 1)[8], picture, atol=1e-4)
    assert set(LOOPS) == set(MOTIONS) - {"auto"}


def test_a_turn_keeps_right_angles_on_a_picture_that_is_not_square() -> None:
    """A line to the right of the middle is turned by the asked angle, in pixels and not in shares of the sides."""
    picture = torch.zeros(1, 40, 80)
    picture[0, 19:21, 42:56] = 1
    down, right = np.indices((40, 80))
    for frame, share in zip(moved(picture, "spin", 8, 8).numpy()[:, 0], LOOP, strict=True):
        angle = np.radians(30 * np.sin(2 * np.pi * share))
        x, y = ((grid + 0.5 - half) * frame for grid, half in ((right, 40), (down, 20)))
        assert abs(np.arctan2(y.sum(), x.sum()) - angle) < 0.03


def test_the_built_in_adapter_bounces_unless_told_otherwise(engine: Engine, quiet: str) -> None:
    """``auto``; with other adapters it is no motion."""
    for adapter, meant in (("builtin", "bounce"), (quiet, "none")):
        animator = Animator(engine, adapter)
        auto, said = (
            video(animator, animation=Animation(FRAMES, 8, motion), strength=0.25)  # type: ignore[arg-type]
            for motion in ("auto", meant)
        )
        assert (auto == said).all()


def test_a_motion_that_nobody_knows_is_refused() -> None:
    """With the words there are."""
    with pytest.raises(InvalidInput, match="motion must be one of auto, none, move, bounce, spin, pulse, got 'fly'"):
        Animation(8, 8, "fly")  # type: ignore[arg-type]


def test_an_adapter_that_changes_nothing_leaves_each_frame_to_the_base_network(engine: Engine, quiet: str) -> None:
    """Frame by frame the video network predicts what the picture network does: every layer is where it belongs."""
    base = parts_of(engine).model.base
    network = VideoNetwork(base, quiet)
    latents = torch.randn(3, 4, 16, 16, generator=seeded(1))
    prompt = Embedding(torch.randn(77, 160, generator=seeded(2)), torch.randn(96, generator=seeded(3)))
    ids, timestep = size_ids(128, 128), torch.tensor(501.0)
    with torch.inference_mode():
        together = network.predict(latents, timestep, prompt, ids)
        alone = base.predict(
            latents,
            timestep.repeat(3),
            prompt.tokens.expand(3, -1, -1),
            prompt.pooled.expand(3, -1),
            ids.expand(3, -1),
        )
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_an_adapter_lets_frames_see_each_other(engine: Engine, loud: str) -> None:
    """Another fourth frame changes what is predicted for the first."""
    network = VideoNetwork(parts_of(engine).model.base, loud)
    latents = torch.randn(4, 4, 8, 8, generator=seeded(1))
    prompt = Embedding(torch.zeros(77, 160), torch.zeros(96))
    other = torch.cat([latents[:3], latents[3:] + 1])
    with torch.inference_mode():
        first, second = (network.predict(x, torch.tensor(501.0), prompt, size_ids(64, 64)) for x in (latents, other))
    assert (first[0] - second[0]).abs().max() > 1e-4


def test_the_video_network_has_the_pictures_layers_themselves(engine: Engine, quiet: str) -> None:
    """No weight is held twice, so a LoRA on the one is on the other."""
    unet = parts_of(engine).model.base.unet
    shared = dict(with_motion(unet, load_adapter(quiet)).named_parameters())
    for name, weight in unet.named_parameters():
        assert shared[name] is weight, name


def test_a_lora_changes_the_video_and_is_off_again_for_the_next_picture(engine: Engine, quiet: str) -> None:
    """Pictures before and after a video with a LoRA are the same, bit for bit."""
    lora = (LoraRef(str(BUILTIN_FOLDER / "loras" / "pixel-art.safetensors"), 1.0),)
    still = request(animation=None, image=None)

    def drawn() -> bytes:
        return next(event.image.tobytes() for event in engine.generate(still) if isinstance(event, ImageReady))

    before = drawn()
    animator = Animator(engine, quiet)
    plain, styled = video(animator), video(animator, loras=lora)
    assert np.abs(plain[1:] - styled[1:]).max() > 8
    assert drawn() == before


def test_a_seed_names_a_video(engine: Engine, quiet: str) -> None:
    """The same seed gives the same frames; another one gives others; fewer frames are not others' beginning."""
    animator = Animator(engine, quiet)
    first, again, other = video(animator), video(animator), video(animator, seed=6)
    assert (first == again).all()
    assert np.abs(first[1:] - other[1:]).max() > 8


def test_noise_has_unit_variance_and_half_of_it_is_the_same_in_all_frames() -> None:
    """Mixed noise: each frame alone is what a network was trained on, and any two have the shared half in common."""
    drawn = clip_noise((4, 64, 64), 8, seeded(1)).flatten(1)
    assert abs(float(drawn.var()) - 1) < 0.02
    between = torch.corrcoef(drawn)[~torch.eye(8, dtype=torch.bool)]
    assert (between - SHARED_NOISE).abs().max() < 0.05


def test_without_a_start_picture_or_with_more_frames_than_the_adapter_tells_apart_there_is_no_video(
    engine: Engine, tmp_path: Path
) -> None:
    """The error names the field, and the next video is made."""
    short = Animator(engine, str(save_adapter(tmp_path / "short", motion_max_seq_length=8)))
    with pytest.raises(InvalidInput, match=r"^image is missing"):
        list(short.animate(request(image=None)))
    with pytest.raises(InvalidInput, match=r"^frames must be at most 8"):
        list(short.animate(request(animation=Animation(9, 8))))
    assert not short.busy
    assert len(video(short)) == FRAMES


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"num_images": 2}, "num_images"), ({"mask_image": start_picture().convert("L")}, "mask_image"),
     ({"refine": "base_image_refiner"}, "refine"), ({"reuse_features": 2}, "reuse_features"),
     ({"acceleration": "fast"}, "acceleration")],
)  # fmt: skip
def test_what_a_video_cannot_have_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    """One video, no mask, no refiner, no shared features; a picture may have them."""
    with pytest.raises(InvalidInput, match=f"^{name} is not for videos"):
        request(**fields)
    request(animation=None, **fields)


@pytest.mark.parametrize(
    ("frames", "fps", "name"), [(7, 8, "frames"), (33, 8, "frames"), (8, 0, "fps"), (8, 31, "fps")]
)
def test_frames_and_their_pace_have_limits(frames: int, fps: int, name: str) -> None:
    """8 to 32 frames, 1 to 30 a second."""
    with pytest.raises(InvalidInput, match=f"^{name} must be between"):
        Animation(frames, fps)


def test_a_request_for_a_video_survives_its_row_and_old_rows_are_pictures() -> None:
    """``from_json`` undoes ``to_json``; a row from before there were videos has no such key."""
    asked = request(image=None)
    assert GenerationRequest.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    old = request(animation=None, image=None).to_json()
    del old["animation"]
    assert GenerationRequest.from_json(old).animation is None


def test_a_cancelled_video_is_gone_before_the_next_step(engine: Engine, quiet: str) -> None:
    """Waiting or running; the other one goes on."""
    animator = Animator(engine, quiet)
    animator.submit(request(), "running")
    animator.submit(request(), "waiting")
    animator.submit(request(), "other")
    animator.step()
    animator.step()
    assert animator.cancel("running") and animator.cancel("waiting") and not animator.cancel("waiting")
    ids = set()
    while animator.busy:
        ids |= {event.request_id for event in animator.step()}
    assert ids == {"other"}


def test_pictures_and_videos_take_turns(engine: Engine, quiet: str) -> None:
    """Between two steps of a picture there is at most one of a video, and the other way round."""
    both = TakingTurns(engine, lambda: Animator(engine, quiet))
    both.submit(request(), "video")
    both.submit(request(animation=None, image=None, num_inference_steps=6), "picture")
    order, ended = [], []
    while both.busy:
        for event in both.step():
            if isinstance(event, Progress):
                order.append(event.request_id)
            ended += [event.request_id] if isinstance(event, Finished) else []
    assert sorted(ended) == ["picture", "video"]
    assert order == ["picture", "picture", "video", "picture", "video", "picture", "video", "picture", "picture"]


def test_without_an_adapter_a_video_fails_and_pictures_are_drawn(engine: Engine) -> None:
    """The reason is the request's error, and names the remedy."""
    both = TakingTurns(engine, lambda: Animator(engine, None))
    both.submit(request(), "video")
    both.submit(request(animation=None, image=None, num_inference_steps=1), "picture")
    events = []
    while both.busy:
        events += both.step()
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request_id == "video" and "motion_adapter" in str(failed.error)
    assert any(isinstance(event, ImageReady) for event in events)


def test_the_shipped_adapter_fits_the_shipped_model_and_makes_the_picture_move(engine: Engine) -> None:
    """The last frames differ from what the same seed gives without it. How well it moves: training/LOG.md."""
    assert find_adapter("builtin") == BUILTIN_MOTION
    assert schedule_of(BUILTIN_MOTION) != ANIMATEDIFF
    assert sum(file.stat().st_size for file in BUILTIN_MOTION.iterdir()) < 8_000_000
    assert len(video(Animator(engine))) == FRAMES


def test_adapters_that_are_none_or_do_not_fit_are_refused(
    engine: Engine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each with a sentence that says which, and what is wrong."""
    base = parts_of(engine).model.base
    for name, problem in (
        ("no/such/folder/here", "was not found"),
        (str(tmp_path), "config.json cannot be read"),
        (str(BUILTIN_FOLDER / "unet"), "is a UNet2DConditionModel, not a MotionAdapter"),
        (str(save_adapter(tmp_path / "wide", block_out_channels=(64, 64, 128))), "does not fit|another width"),
        (str(save_adapter(tmp_path / "deep", block_out_channels=(32, 64, 128, 128))), "does not fit"),
        (str(save_adapter(tmp_path / "pia", conv_in_channels=9)), "not supported"),
    ):
        with pytest.raises(ModelError, match=problem):
            VideoNetwork(base, name)
    with pytest.raises(ModelError, match="no motion adapter"):
        VideoNetwork(base, None)
    whole = save_adapter(tmp_path / "whole")
    file = whole / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("down_blocks.0.motion_modules.0.proj_in.weight")
    save_file(state, file)
    with pytest.raises(ModelError, match=r"1 tensors missing.*proj_in"):
        VideoNetwork(base, str(whole))
    other = Engine.load(str(save_random_sdxl(tmp_path_factory.mktemp("models") / "m")), device="cpu", dtype="float32")
    with pytest.raises(ModelError, match="does not fit"):
        Animator(other, "builtin")


def test_counting_numbers_may_be_left_out_of_an_adapters_file(engine: Engine, tmp_path: Path) -> None:
    """Some published files have no ``pos_embed.pe``: they are computed."""
    folder = save_adapter(tmp_path / "bare", 0.2)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not name.endswith(motion._CLOCK)}, file)
    assert len(video(Animator(engine, str(folder)))) == FRAMES


def test_which_adapter_a_setting_means() -> None:
    """``auto`` is the built-in model's own, and nothing for any other model."""
    assert motion_adapter("auto", "builtin") == "builtin"
    assert motion_adapter("auto", "/models/sdxl") is None
    assert motion_adapter("none", "builtin") is None
    assert motion_adapter("me/adapter", "/models/sdxl") == "me/adapter"
