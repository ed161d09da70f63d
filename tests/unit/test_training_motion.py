"""The built-in motion adapter: how things move, how a video is noised, and that its training goes on after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from impasto.models.motion import load_adapter
from training import architecture, motion, tuning
from training.motion_files import write_adapter
from training.poses import MOTIONS, PERIOD, Pose, Rest, pose, posed
from training.subjects import CAST


@pytest.fixture(autouse=True)
def ordinary_arithmetic() -> Iterator[None]:
    """Training flushes denormal numbers for speed; the tests after these need them."""
    yield
    torch.set_flush_denormal(False)


def disc() -> np.ndarray:
    """A red disc on nothing."""
    down, across = np.mgrid[-1:1:64j, -1:1:64j]
    art = np.zeros((64, 64, 4), np.uint8)
    art[np.hypot(down, across) < 0.95] = (200, 30, 30, 255)
    return art


def middle(picture: np.ndarray) -> tuple[float, float, float]:
    """Where the red is, across and down as shares of the side, and its share of the area."""
    red = picture[0] - picture[2] > 0.5
    down, across = np.nonzero(red)
    side = picture.shape[-1]
    return across.mean() / side, down.mean() / side, red.mean()


def test_every_subject_of_the_cast_has_one_motion_that_is_a_loop() -> None:
    """It begins at rest, and after eight frames it is there again."""
    assert sorted(subject for _, subjects in MOTIONS.values() for subject in subjects) == sorted(CAST)
    for subject in CAST:
        assert pose(subject, 0) == pose(subject, PERIOD) == Pose()
        assert len({pose(subject, frame) for frame in range(PERIOD)}) > 3


def test_a_pose_is_where_its_numbers_say() -> None:
    """Moved, shrunk, turned: measured in the picture."""
    ground, rest = (20, 40, 220), Rest(0.5, 0.5, 0.5)
    x, y, area = middle(posed(disc(), 128, ground, rest, Pose()))
    assert abs(x - 0.5) < 0.01 and abs(y - 0.5) < 0.01
    moved = middle(posed(disc(), 128, ground, rest, Pose(right=0.2, down=-0.1)))
    np.testing.assert_allclose(moved, (0.7, 0.4, area), atol=0.012)
    small = middle(posed(disc(), 128, ground, rest, Pose(size=0.5)))
    np.testing.assert_allclose(small, (0.5, 0.5, area / 4), atol=0.012)
    turned = posed(disc(), 128, ground, rest, Pose(turn=30))
    np.testing.assert_allclose(middle(turned), (0.5, 0.5, area), atol=0.012)


def test_a_noisy_video_lies_on_the_way_that_eulers_steps_go() -> None:
    """From the noised start picture, following the estimate down to no noise ends at the video, from any level."""
    draw = torch.Generator().manual_seed(1)
    start, target, noise = (torch.randn(1, frames, 4, 8, 8, generator=draw) for frames in (1, 3, 3))
    begin = torch.tensor([4.0])
    for sigma in (torch.tensor([4.0]), torch.tensor([1.5])):
        noisy, told = motion.noised(start, target, noise, sigma, begin)
        raw = noisy * (1 + sigma**2).sqrt()
        torch.testing.assert_close(raw - sigma * told, target, atol=1e-5, rtol=0)
        if sigma == begin:
            torch.testing.assert_close(raw, start + sigma * noise, atol=1e-5, rtol=0)


def test_the_first_frame_is_always_among_those_seen_and_levels_never_pass_the_beginning() -> None:
    """Frames in order, none twice; the network is told a timestep no noisier than where drawing began."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        frames = motion.some_frames(rng, 4)
        assert frames[0] == 0 and (np.diff(frames) > 0).all() and frames[-1] < motion.FRAMES
        now, begin = motion.levels(rng, 4, 600)
        assert (now <= begin).all() and (begin >= 600).all() and (now >= 0).all()


def tiny_loops(*_: object) -> motion.Loops:
    latents = torch.randn(3, PERIOD, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    return motion.Loops(latents, np.array([(0, 0, i) for i in range(3)]))


COURSE = motion.Course(stages=(motion.Stage(3, 2, 3), motion.Stage(1, 1, 5)))


def test_before_training_nothing_changes_and_only_the_layers_between_frames_learn() -> None:
    """The spatial network keeps its weights."""
    student = motion.Student()
    learning = {name for name, weight in student.unet.named_parameters() if weight.requires_grad}
    assert learning and all(".motion_modules." in name for name in learning)
    ends = [layer for name, layer in student.layers.named_modules() if name.endswith("proj_out")]
    assert ends and not any(weight.any() for layer in ends for weight in layer.parameters())


def test_training_goes_on_after_a_stop_as_if_there_had_been_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps and two more give what four in one go do; the loss is finite and the layers have moved."""
    monkeypatch.setattr(motion, "loops", tiny_loops)
    whole, losses = motion.train(COURSE, tmp_path / "whole.pt", tmp_path)
    asked = iter(range(100))
    with monkeypatch.context() as stopped:
        stopped.setattr(tuning, "asked_to_stop", lambda: next(asked) >= 2)
        first, _ = motion.train(COURSE, tmp_path / "parts.pt", tmp_path)
    assert first.step == 2 and whole.step == 4 and np.isfinite(losses).all()
    again, _ = motion.train(COURSE, tmp_path / "parts.pt", tmp_path)
    for name, tensor in whole.learned().items():
        torch.testing.assert_close(again.learned()[name], tensor, atol=1e-6, rtol=0)
    assert any(tensor.abs().max() > 0 for name, tensor in whole.learned().items() if name.endswith("proj_out.weight"))


def test_what_is_written_can_be_loaded(tmp_path: Path) -> None:
    """Every tensor, in half precision, with configuration, schedule and card."""
    adapter = motion.new_adapter(architecture.UNET_WIDTHS)
    write_adapter(tmp_path, adapter.state_dict(), adapter.config, 7)
    loaded = load_adapter(str(tmp_path)).state_dict()
    assert loaded.keys() == adapter.state_dict().keys()
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.json", "scheduler_config.json", "diffusion_pytorch_model.fp16.safetensors",
    }  # fmt: skip
    assert "7 steps" in (tmp_path / "README.md").read_text()
