"""The second edition's recipe beside the base: refiner, few steps, a rented GPU's errands, and the evaluation."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from impasto.engine.engine import Engine
from impasto.lora.inspect import inspect_lora
from impasto.models.catalog import find_model
from impasto.models.shapes import parameter_shapes
from impasto.types import GenerationRequest, ImageReady
from tests.unit.test_training_second import known, painted, plain, red_squares, small_vae  # noqa: F401
from training import checkpoint, words
from training.adapter_files import write_lora
from training.adapters import ALPHA
from training.second import (
    autoencoder,
    evaluate,
    export,
    few_steps,
    gallery,
    judge,
    learn,
    lease,
    looks,
    measures,
    model_card,
    questions,
    refiner,
    ship,
    tables,
)
from training.second.course import COURSES, TINY
from training.second.evaluate import Seen
from training.second.hand import Hand
from training.second.learn import Painter
from training.second.optimiser import Muon, MuonBesideAdamW
from training.second.render import backdrops, render
from training.second.scene import Frame, Ground, Scene, Thing, held_out
from training.second.subjects import COLOURS, LANDS, SKIES, subjects
from training.second.vocabulary import Vocabulary
from training.team import alone

WHITE, BLUE = COLOURS.index("white"), COLOURS.index("blue")


@pytest.fixture(autouse=True)
def ordinary_arithmetic() -> Iterator[None]:
    """Training flushes denormal numbers for speed; the tests after these need them."""
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("known")
def test_the_engine_takes_the_exported_base_and_refiner_as_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrained networks, written as folders, load as an SDXL base with its refiner and draw a picture together."""
    monkeypatch.setattr(autoencoder, "settled", small_vae)
    torch.manual_seed(0)
    base, made = Painter(TINY), refiner.Refiner(TINY.widths)
    export.write(base, small_vae(), tmp_path / "base")  # type: ignore[arg-type]
    size = export.write(made, small_vae(), tmp_path / "refiner", whole=False)  # type: ignore[arg-type]
    assert size < export.LIMIT_BYTES and not (tmp_path / "refiner" / "text_encoder").exists()
    assert json.loads((tmp_path / "refiner" / "model_index.json").read_text())["requires_aesthetics_score"] is True
    engine = Engine.load(str(tmp_path / "base"), refiner=str(tmp_path / "refiner"), dtype="float32", device="cpu")
    asked = GenerationRequest("a fox", width=64, height=64, num_inference_steps=2, refine="expert_ensemble_refiner")
    assert [e.image.size for e in engine.generate(asked) if isinstance(e, ImageReady)] == [(64, 64)]


def test_a_synonym_reads_as_its_word_and_any_other_as_one_that_changes_nothing(
    known: Vocabulary,  # noqa: F811
) -> None:
    """A plural that no caption has is the thing itself; captions' own words keep what they learned."""
    rows = torch.randn(len(known.used), 8, generator=torch.Generator().manual_seed(0))
    full = export.full_rows(rows, known)
    filler = rows[list(known.filler_rows)].mean(0)
    first, rest = words.ids_of("cacti")
    torch.testing.assert_close(full[first], rows[known.rows["cactus"][0]])
    for ordinary in (rest, *words.ids_of("helmet")):
        torch.testing.assert_close(full[ordinary], filler)
    assert torch.equal(full[list(known.used)], rows)
    for word, meant in export.SYNONYMS.items():
        assert word not in known.rows and len(known.rows[meant]) == 1
        assert words.ids_of(word)[0] not in known.used


@pytest.mark.usefixtures("known")
def test_what_ships_is_the_export_without_what_the_refiner_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, refiner, LoRAs and cards replace the old folder whole, and the motion adapter stays; or nothing changes."""
    target, made = tmp_path / "builtin", tmp_path / "export"
    torch.manual_seed(0)
    export.write(Painter(TINY), small_vae(), made / "base")  # type: ignore[arg-type]
    export.write(refiner.Refiner(TINY.widths), small_vae(), made / "refiner", whole=False)  # type: ignore[arg-type]
    (target / "motion").mkdir(parents=True)
    (target / "motion" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError):
        ship.ship(made, target)
    assert [path.name for path in target.iterdir()] == ["motion"]
    assert not list(tmp_path.glob("tmp*"))
    factors = few_steps.factors_of(student := few_steps.Student(Painter(TINY)), checkpoint.Average(student, 0.9).module)
    for name in export.LORAS:
        write_lora(made / "loras" / f"{name}.safetensors", factors, few_steps.CARD, ALPHA, 1)
    size = ship.ship(made, target)
    assert size == sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) < export.LIMIT_BYTES
    assert {path.name for path in (target / "refiner").iterdir()} == {"unet", "scheduler", "model_index.json"}
    assert find_model(str(target)).kind == "base" and (target / "motion" / "config.json").exists()
    assert "few-steps.safetensors" in (target / "loras" / "README.md").read_text()
    assert "motorcycle" in (target / "README.md").read_text()
    monkeypatch.setattr(export, "LIMIT_BYTES", size - 1)
    with pytest.raises(ValueError, match="more than"):
        ship.ship(made, target)
    assert (target / "README.md").exists()


def test_wear_grows_with_the_noise_and_leaves_some_pictures_whole() -> None:
    """At no noise nothing is worn; at much noise about half of the pictures are."""
    latents = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = refiner.worn(latents, 1, torch.full((64,), 0.99999))
    assert (clean - latents).abs().max() < 0.05
    changed = (refiner.worn(latents, 1, torch.full((64,), 0.5)) - latents).flatten(1).abs().amax(1) > 0
    assert 16 < int(changed.sum()) < 48


@pytest.mark.usefixtures("known")
def test_a_student_begins_as_its_teacher_and_its_file_is_a_lora_the_product_reads(tmp_path: Path) -> None:
    """Before the first step the factors change nothing; written, every one of them is understood."""
    torch.manual_seed(0)
    base = Painter(TINY)
    given = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 256), torch.randn(1, 160)
    six = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        before = base(*given, six)
        student = few_steps.Student(base)
        torch.testing.assert_close(student(*given, six), before)
    learning = [name for name, p in student.named_parameters() if p.requires_grad]
    assert learning and all("down" in name or "up" in name for name in learning)
    learned = few_steps.factors_of(student, checkpoint.Average(student, 0.9).module)
    write_lora(tmp_path / "few.safetensors", learned, few_steps.CARD, ALPHA, 1)
    export.write(Painter(TINY), small_vae(), tmp_path / "base")  # type: ignore[arg-type]
    found = inspect_lora(tmp_path / "few.safetensors", "few", parameter_shapes(find_model(str(tmp_path / "base"))))
    assert found.problem is None and found.report.mismatched.count == found.report.unmatched.count == 0


def test_looks_redraw_objects_and_what_is_behind_them() -> None:
    """Pixel art has one colour a square and a dark outline; line art a contour on white."""
    table = tables.tabulate([plain([Thing(0, 0.5, 0.5, 0.5)], BLUE, frame=Frame(128, 128))])
    pictures, behind = render(table, red_squares()), backdrops(table, torch.device("cpu")) * 2 - 1
    pixels = looks.pixel_art(pictures, behind)[0]
    assert torch.equal(pixels, pixels[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert pixels[:, 64, 64].tolist() == [1, -1, -1] and pixels[2, 4, 4] > pixels[0, 4, 4]
    assert pixels[:, 64, 30].max() < -0.5  # just left of the object
    lines = looks.line_art(pictures, behind)[0]
    assert lines[:, 4, 4].tolist() == [1, 1, 1] and lines[:, 64, 31].tolist() == [-1, -1, -1]
    assert -1 < lines[0, 64, 64] < 1


@pytest.mark.usefixtures("known")
def test_a_look_is_learned_on_the_frozen_base_and_written_as_a_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps on a tiny base: the factors change, the base does not, and the product reads the file."""
    monkeypatch.setattr(learn.art, "load", lambda _device: red_squares())
    monkeypatch.setattr(autoencoder, "settled", small_vae)
    torch.manual_seed(0)
    base = Painter(TINY)
    checkpoint.save(tmp_path / "tiny.pt", {"live": base.state_dict(), "average": base.state_dict(), "stage": 1})
    losses = looks.train(alone(), COURSES["tiny-pixel-art"], tmp_path, device="cpu")
    assert len(losses) == 3 and all(np.isfinite(losses))
    done = checkpoint.load(tmp_path / "tiny-pixel-art.pt")
    assert done is not None and any(bool(w.abs().max() > 0) for name, w in done["live"].items() if name.endswith("up"))
    frozen = {name: value for name, value in done["live"].items() if name.endswith("parametrizations.weight.original")}
    assert frozen
    for name, value in frozen.items():
        assert torch.equal(value, base.state_dict()[name.replace("parametrizations.weight.original", "weight")]), name
    export.write(base, small_vae(), tmp_path / "base")  # type: ignore[arg-type]
    shapes = parameter_shapes(find_model(str(tmp_path / "base")))
    found = inspect_lora(tmp_path / "tiny-pixel-art.safetensors", "pixel-art", shapes)
    assert found.problem is None and found.report.mismatched.count == found.report.unmatched.count == 0


@pytest.mark.usefixtures("known")
def test_what_is_behind_is_no_object_however_soft_the_picture(tmp_path: Path) -> None:
    """An enlarged scenery without things has no contours in line art."""
    behind = Ground(-1, LANDS.index("sea"), SKIES.index("sunset"), True, 5)
    run = looks.LookRun.__new__(looks.LookRun)
    run.course = COURSES["tiny-line-art"]
    made = run.paint(tables.tabulate([Scene((), 0, behind, Frame(128, 128, sharp=0.25))]), red_squares())
    assert made.min() == made.max() == 1


def test_at_no_noise_the_student_answers_with_what_it_was_given() -> None:
    """The boundary condition of consistency models; far from it the answer is the estimate alone."""
    skip, out = few_steps.boundary(torch.tensor([0, 999]))
    assert skip.flatten().tolist() == pytest.approx([1, 0], abs=1e-4)
    assert out.flatten().tolist() == pytest.approx([0, 1], abs=1e-4)


def test_results_travel_in_parts_and_are_put_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes home is the average in half precision, without the optimiser, in parts of bounded size."""
    monkeypatch.setattr(lease, "PART", 1000)
    away, home = tmp_path / "away", tmp_path / "home"
    weights = {"w": torch.randn(400)}
    far = {"stage": 1, "stage_step": 2, "step": 3, "samples": 4, "spent": 5.0}
    state = far | {"live": weights, "average": {"w": torch.ones(400)}, "optimiser": {"m": torch.zeros(9999)}}
    checkpoint.save(away / "tiny.pt", state)
    (away / lease.LEDGER).write_text(json.dumps({"base": 60.0}))
    lease.results(lease.Lease(away, tmp_path / "out", TINY, "cpu", 0))
    parts = sorted((tmp_path / "out").glob("weights.zip.*"))
    assert len(parts) > 1 and all(part.stat().st_size <= 1000 for part in parts)
    assert set(lease.take(tmp_path / "out", home)) == {"tiny.pt", lease.LEDGER}
    found = checkpoint.load(home / "tiny.pt")
    assert found is not None and "optimiser" not in found and found["step"] == 3
    assert found["live"]["w"].dtype == torch.float16 and bool((found["average"]["w"] == 1).all())
    assert lease.spent(home)["base"] == 60.0 and lease.spent(home)["refiner"] == 0.0


def test_the_phases_share_the_whole_time() -> None:
    """Shares add up to it, and each base course has a refiner and a distillation of its own."""
    assert sum(share for share, _ in lease.PHASES.values()) == pytest.approx(1)
    for name in ("cpu", "gpu", "tiny"):
        assert COURSES[f"{name}-refiner"].base == COURSES[f"{name}-few-steps"].base == name


def test_the_measures_find_what_was_composed() -> None:
    """Background, number, place and order of objects, on pictures that are known."""
    frame = Frame(256, 256)
    pair = [Thing(0, 0.4, 0.26, 0.5), Thing(0, 0.4, 0.74, 0.5)]
    one, two, corner = painted(
        plain([Thing(0, 0.7, 0.5, 0.5)], BLUE, frame=frame),
        plain(pair, WHITE, frame=frame),
        plain([Thing(0, 0.3, 0.75, 0.25)], BLUE, frame=frame),
    ).astype(np.float64)
    assert measures.background(one) == "blue" and measures.background(two) == "white"
    assert [len(measures.objects(picture)) for picture in (one, two, corner)] == [1, 2, 1]
    assert measures.place(measures.objects(one)[0]) == ""
    assert measures.place(measures.objects(corner)[0]) == "top right"
    cut = measures.cut(corner, measures.objects(corner)[0])
    assert cut.shape[0] == cut.shape[1] < 256 and measures.background(cut) == "blue"


def test_seam_grain_and_squares_tell_flaws_from_their_absence() -> None:
    """1 on a slope, more where there is a step; 0 on a plain colour, more with noise; 0 on squares, 1 on a slope."""
    slope = np.mgrid[0:256, 0:256][1][..., None].repeat(3, 2).astype(np.float64)
    stepped = slope + 20 * (slope >= 128)
    assert measures.seam(slope, 128) == pytest.approx(1) and measures.seam(stepped, 128) > 10
    flat = np.full((256, 256, 3), 90.0)
    noisy = flat + np.random.default_rng(0).normal(0, 5, flat.shape)
    assert measures.grain(flat) == 0 and measures.grain(noisy) == pytest.approx(5, rel=0.1)
    blocks = np.random.default_rng(1).uniform(0, 255, (16, 16, 3)).repeat(16, 0).repeat(16, 1)
    assert measures.squares(blocks) < 1e-9 and measures.squares(slope) == pytest.approx(1)


def test_the_evaluation_asks_only_for_what_training_leaves_out() -> None:
    """Every question of every kind; each prompt names what its scene shows."""
    names = [subject.name for subject in subjects()[:20]]
    rare = [subject.name for subject in subjects()[20:40]]
    asked = questions.questions(names, 20, rare=rare)
    assert len(asked) == 20 * len(questions.KINDS) + 7 and len({question.seed for question in asked}) == len(asked)
    for question in asked:
        assert held_out(question.scene)
        assert COLOURS[question.scene.ground.colour] in question.prompt
        shown = subjects()[question.scene.things[0].subject]
        assert shown.name in question.prompt or shown.plural in question.prompt
    with pytest.raises(ValueError, match="zyzzyva"):
        questions.questions(["zyzzyva"], 1)


def test_the_tally_tells_right_answers_from_shifted_ones() -> None:
    """A perfect model has 1 everywhere; the same pictures against other questions have almost nothing right."""
    names = [subject.name for subject in subjects()[:20]]
    asked = [question for question in questions.questions(names, 20) if question.kind == "single"]
    seen = [
        Seen(COLOURS[q.scene.ground.colour], (subjects()[q.scene.things[0].subject].name,), ("3d",), ("",))
        for q in asked
    ]
    assert set(evaluate.tally(asked, seen)["single"].values()) == {1.0}
    assert evaluate.tally(asked, seen, shift=7)["single"]["object"] == 0


def test_the_card_tells_every_figure_of_the_report() -> None:
    """The table has a row for each kind and matter, with both controls, and the command that made it."""
    share = {"single": {"background": 0.97, "object": 0.85}}
    report = {
        "edition": "second", "subjects": 3, "rare_subjects": 4, "count": 5, "questions": 27,
        "size": 512, "steps": 20, "guidance": 5.0,
        "judge_on_composed_pictures": 0.961, "generated": share, "composed": share,
        "shuffled": {"single": {"background": 0.11, "object": 0.01}},
        "nearest_training_picture": {"generated": 0.05, "unseen_real": 0.04},
        "features": {"inpainting": {"seam": 1.1, "kept_part_changed": 0.0}, "grain": 2.0, "sharpness": 30.0},
    }  # fmt: skip
    text = model_card.text(report)
    assert "| single | object | 85% | 85% | 1% |" in text and "96.1%" in text
    assert "python -m training.second.evaluate --edition second --count 5" in text and "of 4 more" in text


def test_a_picture_without_an_object_has_none() -> None:
    """The control of the measure of objects."""
    empty = Image.new("RGB", (64, 64), "white")
    assert measures.objects(np.asarray(empty, np.float64)) == []


def test_the_judge_goes_on_where_it_stopped_and_tells_its_own_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps in two calls; what is read back names subjects and styles and says how often it is right."""
    monkeypatch.setattr(judge.art, "load", lambda _device: red_squares())
    for steps in (1, 2):
        judge.train(steps, device="cpu", state=tmp_path / "judge.pt")
    done = checkpoint.load(tmp_path / "judge.pt")
    assert done is not None and done["step"] == 2
    made, accuracy = judge.trained(tmp_path / "judge.pt")
    subject, style = made(torch.zeros(2, 3, 96, 96))
    assert subject.shape == (2, len(subjects())) and style.shape == (2, 3) and 0 <= accuracy < 0.2


@pytest.mark.usefixtures("known")
def test_the_evaluation_runs_from_prompts_to_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained networks through the whole of it: every kind has its figures and controls, and the card is written."""
    monkeypatch.setattr(evaluate.art, "load", red_squares)
    torch.manual_seed(0)
    export.write(Painter(TINY), small_vae(), tmp_path / "base")  # type: ignore[arg-type]
    engine = Engine.load(str(tmp_path / "base"), dtype="float32", device="cpu", max_batch=1)
    hand, eye = Hand(engine, size=64, steps=1, guidance=1.0), evaluate.Eye(judge.Judge().eval(), 0.5)
    more = {"loras": tmp_path, "refined": False, "few_steps": None}
    report, grid = evaluate.evaluate(hand, eye, ["fox", "cat", "dog"], 2, more)
    assert report["generated"].keys() == report["composed"].keys() == set(questions.KINDS)
    assert report["composed"]["single"]["background"] == 1 and report["composed"]["two alike"]["count"] == 1
    assert report["composed"]["place"]["place"] == 1
    assert grid.size[0] == evaluate.COLUMNS * 160
    assert "Refiner: none ships" in model_card.text({"edition": "second"} | report)


def layers() -> nn.Sequential:
    """A kernel, a matrix, a narrow kernel and vectors."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 3, 3), nn.Flatten()
    )
    made.append(nn.Linear(12, 5))
    return made.to(memory_format=torch.channels_last)


def learned(network: nn.Sequential, optimiser: MuonBesideAdamW, steps: int) -> float:
    """The loss after so many steps on one batch."""
    inputs, wanted = torch.linspace(-1, 1, 4 * 8 * 36).view(4, 8, 6, 6), torch.eye(4, 5)
    for _ in range(steps):
        optimiser.zero_grad()
        (network(inputs) - wanted).square().mean().backward()
        optimiser.step()
    return (network(inputs) - wanted).square().mean().item()


def test_muon_beside_adamw_changes_every_parameter_and_goes_on_after_a_stop():
    """Kernels through their views; a run that is stopped and taken up again ends where one in a piece does."""
    whole, halves = layers(), layers()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    optimiser = MuonBesideAdamW(whole.parameters(), (), 2.5, 0.2)
    first = learned(whole, optimiser, 0)
    last = learned(whole, optimiser, 20)
    assert last < 0.5 * first
    assert all((value != before[name]).any() for name, value in whole.state_dict().items())
    earlier = MuonBesideAdamW(halves.parameters(), (), 2.5, 0.2)
    learned(halves, earlier, 10)
    later = MuonBesideAdamW(halves.parameters(), (), 2.5, 0.2)
    later.load_state_dict(earlier.state_dict())
    assert learned(halves, later, 10) == pytest.approx(last, rel=1e-5)


def test_muon_steps_as_torch_s_does() -> None:
    """The same matrix and gradients: the same way to within the precision of torch's bfloat16."""
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.zeros(24, 40)), nn.Parameter(torch.zeros(24, 40))
    one = Muon([ours])
    other = torch.optim.Muon([theirs], 1e-3, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()  # type: ignore[no-untyped-call]
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_muon_refuses_kernels_it_cannot_see_as_matrices():
    with pytest.raises(ValueError, match="innermost"):
        MuonBesideAdamW(nn.Conv2d(8, 16, 3).parameters(), (), 1.0, 1.0)


def test_the_gallery_draws_each_picture_by_the_line_that_its_page_names(tmp_path: Path) -> None:
    """A picture comes from the command itself, and the page's lines are those commands, the documented one in full."""
    shown = gallery.Shown("one", "a fox, isn't it", 5, ("--size", "512*512", "--steps", "1"))
    assert shlex.split(shlex.join(shown.command)) == shown.command
    assert gallery.draw(shown, tmp_path).size == (512, 512)
    with pytest.raises(subprocess.CalledProcessError):
        gallery.draw(replace(shown, options=("--size", "none")), tmp_path)
    told = [line for line in gallery.page("grid.jpg", "one.jpg").splitlines() if line.startswith("impasto generate")]
    assert [shlex.split(line) for line in told] == [one.command for one in (gallery.EXAMPLE, *gallery.GRID)]
    assert len({one.name for one in gallery.GRID}) == len(gallery.GRID)
