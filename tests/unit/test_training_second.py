"""The second edition's recipe up to a training step: subjects, words, scenes, pictures, stores, courses."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from training import architecture, checkpoint, words
from training.arithmetic import CPU as CPU_DEVICE
from training.arithmetic import short
from training.places import BUILTIN
from training.second import art, autoencoder, cells, growth, learn, plans, reading, reservoir, scene, tables
from training.second import vocabulary as vocabulary_module
from training.second.art import LEVELS, Art
from training.second.captions import STYLE_BEFORE, caption
from training.second.course import CPU, GPU, TINY_GROWN, TINY_INNER, Course, Size, Stage
from training.second.render import render
from training.second.scene import CORE, Frame, Ground, Scene, Thing, draw, held_out
from training.second.subjects import COLOURS, LANDS, SKIES, STYLES, subjects
from training.second.vocabulary import spelled, vocabulary
from training.subjects import BACKGROUNDS
from training.team import alone

WHITE, BLACK = COLOURS.index("white"), COLOURS.index("black")


@pytest.fixture(autouse=True)
def ordinary_arithmetic() -> Iterator[None]:
    """Training flushes denormal numbers for speed; the tests after these need them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[vocabulary_module.Vocabulary]:
    """The vocabulary, made from the shipped tokenizer instead of the fetched package."""
    listed = tmp_path / "bpe.txt.gz"
    listed.write_bytes(gzip.compress((BUILTIN / "tokenizer" / "merges.txt").read_bytes()))
    monkeypatch.setattr(words, "BPE", listed)
    monkeypatch.setattr(words, "CACHE", tmp_path)
    monkeypatch.setattr(vocabulary_module, "TABLE", tmp_path / "vocabulary.json")
    vocabulary.cache_clear()
    yield vocabulary()
    vocabulary.cache_clear()


def red_squares() -> Art:
    """Drawings that are all the same: an opaque red square that fills its frame."""
    count = len(subjects()) * len(STYLES)
    red = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)[None, :, None, None]
    return Art({side: red.expand(count, 4, side, side) for side in LEVELS})


def some_scenes(count: int, seed: int = 0, **more: object) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw(rng, 256, 256, len(subjects()), **more) for _ in range(count)]  # type: ignore[arg-type]


def plain(things: list[Thing], colour: int, style: int = 0, frame: Frame | None = None) -> Scene:
    return Scene(tuple(things), style, Ground(colour), frame or Frame(64, 64))


def painted(*scenes: Scene) -> np.ndarray:
    """Pictures (n, height, width, 3) of 0..255."""
    made = render(tables.tabulate(list(scenes)), red_squares())
    return ((made.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round()


def test_there_are_several_hundred_subjects_each_with_one_name_and_three_drawings() -> None:
    """No name or synonym stands for two subjects; the documented example's nouns are there."""
    table = subjects()
    assert len(table) >= 300 and all(subject.code for subject in table)
    said = [word for subject in table for word in {subject.name, *subject.synonyms}]
    assert len(said) == len(set(said))
    assert {"motorcycle", "cactus", "mountain"} <= {subject.name for subject in table[:CORE]}


def test_every_caption_is_in_the_vocabulary_and_read_as_clip_reads_it(known: vocabulary_module.Vocabulary) -> None:
    """Looking words up one by one gives the ids that CLIP's tokenizer gives for the whole caption."""
    rng = np.random.default_rng(1)
    for at, one in enumerate(some_scenes(300)):
        text = caption(rng, one)
        found = [known.used[row] for word in spelled(text) for row in known.rows[word]]
        if at % 10 == 0:
            assert found == words.ids_of(text), text
    first, second = known.encode(["a cat, blue background", ""], 16)
    bos, eos, mark = known.marks
    assert first[:, 0].tolist() == [bos, bos] and first[1, 1:].eq(eos).all() and second[1, 2:].eq(mark).all()


def test_what_a_caption_leaves_out_has_one_meaning() -> None:
    """Flat and black and white are always said, and every plain colour but white, and every sky but day's."""
    rng = np.random.default_rng(2)
    for one in some_scenes(800):
        text, ground = caption(rng, one), one.ground
        if one.things and one.style:
            assert any(words in text for words in STYLE_BEFORE[STYLES[one.style]]) or STYLES[one.style] in text, text
        if ground.plain and ground.colour != WHITE:
            assert COLOURS[ground.colour] in text, text
        if not ground.plain and SKIES[ground.sky] == "night":
            assert "night" in text or "stars" in text, text


def test_every_thing_of_a_scene_is_named() -> None:
    """Both of a pair; a number for several alike."""
    rng = np.random.default_rng(3)
    for one in some_scenes(500, pairs=0.9):
        text = caption(rng, one)
        for thing in one.things:
            subject = subjects()[thing.subject]
            assert any(word in text for word in (subject.name, subject.plural or subject.name, *subject.synonyms)), text


def test_training_never_draws_what_the_evaluation_asks_for() -> None:
    """Every subject has, in each style, one plain colour that only the evaluation sees; the lots keep to that."""
    for subject in range(0, len(subjects()), 17):
        for style in range(len(STYLES)):
            kept = [held_out(plain([Thing(subject, 0.7, 0.5, 0.5)], colour, style)) for colour in range(len(COLOURS))]
            assert sum(kept) == 1
    assert not any(held_out(one) for one in some_scenes(500))
    assert all(held_out(one) for one in some_scenes(50, kept_out=True))


def test_an_object_is_painted_where_the_scene_says() -> None:
    """Size is a share of the shorter side; the middle is where it was put, in wide pictures too."""
    wide = plain([Thing(0, 0.5, 0.25, 0.5)], WHITE, frame=Frame(64, 128))
    picture = painted(wide)[0]
    rows, columns = np.nonzero(picture[..., 1] < 10)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (16, 48, 16, 48)
    assert (picture[0, 0] == BACKGROUNDS["white"]).all()


def test_a_window_shows_a_part_of_the_same_picture() -> None:
    """A cropped frame is the canvas's own pixels, and its six numbers tell size and corner."""
    ground = Ground(-1, LANDS.index("desert"), SKIES.index("sunset"), True, seed=5)
    canvas = Scene((Thing(0, 0.5, 0.5, 0.5),), 0, ground, Frame(96, 96))
    window = Scene(canvas.things, 0, ground, Frame(64, 64, 16, 24, 96, 96))
    np.testing.assert_allclose(painted(window)[0], painted(canvas)[0][16:80, 24:88], atol=1)
    assert window.frame.ids == (96, 96, 16, 24, 64, 64)
    assert Frame(512, 512, sharp=0.5).ids == (256, 256, 0, 0, 512, 512)


def test_sceneries_have_land_below_a_sky_of_their_hour() -> None:
    """Night is darker than day, the desert's ground is yellower than its sky, and mountains change the picture."""

    def scenery(land: str, sky: str, mountains: bool = False) -> Scene:
        return Scene((), 0, Ground(-1, LANDS.index(land), SKIES.index(sky), mountains, seed=9), Frame(64, 64))

    day, night, hills = painted(scenery("desert", "day"), scenery("desert", "night"), scenery("desert", "day", True))
    assert night.mean() < 0.5 * day.mean()
    sky, ground = day[4].mean(0), day[60].mean(0)
    assert ground[0] > ground[2] + 40 and sky[2] > sky[0] + 40
    assert np.abs(hills - day).mean() > 2


def test_a_drawing_without_colours_runs_from_black_to_white() -> None:
    """Its greys are spread, its outline stays."""
    drawn = np.zeros((8, 8, 4), np.uint8)
    drawn[2:6, 2:4], drawn[2:6, 4:6] = (200, 40, 40, 255), (240, 230, 80, 255)
    grey = np.asarray(art.greyed(Image.fromarray(drawn, "RGBA")))
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 3] == drawn[..., 3]).all()
    assert grey[3, 3, 0] < 20 and grey[3, 5, 0] > 200


def small_vae() -> torch.nn.Module:
    torch.manual_seed(0)
    return architecture.vae().requires_grad_(False)


def test_a_store_holds_the_scenes_of_its_step_and_is_found_full_again(tmp_path: Path) -> None:
    """Scene n lies at n modulo the capacity; a torn place is found missing; another process finds what was written."""
    material = reservoir.Material(8, 8, 8, 0.7, 0.2, 0.0, seed=3)
    store = reservoir.Reservoir(material, 6, red_squares(), small_vae(), tmp_path)  # type: ignore[arg-type]
    assert store.missing(0) == list(range(6))

    def fill(numbers: list[int]) -> None:
        store.renew(numbers, tables.tabulate([material.scene(number) for number in numbers]))

    fill(list(range(6)))
    assert store.missing(0) == [] and store.missing(2) == [6, 7]
    fill([6])
    again = reservoir.Reservoir(material, 6, red_squares(), small_vae(), tmp_path)  # type: ignore[arg-type]
    assert again.missing(1) == [] and again.missing(0) == [0]
    torch.testing.assert_close(again.latents, store.latents)
    again.numbers[3] = reservoir.EMPTY
    assert again.missing(1) == [3]


def test_a_course_counts_samples_or_shares_out_minutes() -> None:
    """By samples a stage lasts its steps; by minutes it lasts its share of them, however fast the machine."""
    assert CPU.where(0, 1e9) == (0, 0.0)
    assert CPU.where(CPU.stages[0].steps, 0)[0] == 1
    assert CPU.where(sum(stage.steps for stage in CPU.stages), 0)[0] == len(CPU.stages)
    timed = GPU.lasting(10)
    shares = [stage.samples for stage in GPU.stages]
    assert timed.where(0, 600 * shares[0] / sum(shares) + 1)[0] == 1
    assert timed.where(5, 601)[0] == len(GPU.stages)


def test_larger_sizes_take_fewer_samples_a_step() -> None:
    """A step costs about the same at every size of a stage."""
    mixed = len(CPU.stages) - 1
    sizes = CPU.stages[mixed].sizes
    counts = [plans.batch_of(CPU, mixed, at, 1) for at in range(len(sizes))]
    smallest = min(range(len(sizes)), key=lambda at: sizes[at].height * sizes[at].width)
    assert counts[smallest] == max(counts) == CPU.stages[mixed].batch and min(counts) >= 1


TINY = Course(
    name="test",
    widths=(32, 64, 128),
    cast=8,
    stages=(
        Stage("a", (Size(8, 8),), 8, 2, (1e-3, 1e-4), 6, renewed=0.5, coarse=0.6, told=1),
        Stage("b", (Size(8, 8), Size(8, 16)), 4, 2, (1e-3, 1e-4), 4, renewed=0.5, told=0.5),
    ),
)


def test_a_plan_is_decided_by_its_step(known: vocabulary_module.Vocabulary) -> None:
    """The same step gives the same plan in any process; what it shows is in store; what it renews comes next."""
    one, same = plans.Plans(TINY, 0)[3], plans.Plans(TINY, 0)[3]
    assert torch.equal(one.ids, same.ids) and torch.equal(one.places, same.places)
    assert one.renewed == [one.renewed[0]] == [plans.Plans(TINY, 0).first(3, 0) + 6 - 1]
    assert not torch.equal(one.ids, plans.Plans(TINY, 0)[4].ids)
    assert (one.timesteps < 1000).all() and one.sizes.shape == (2, 6)


@pytest.mark.usefixtures("known")
def test_every_plan_finds_its_pictures_in_store_whichever_sizes_came_between() -> None:
    """Renewed by each plan in turn, a size's store never lacks a scene, though other sizes come in between."""
    made, held = plans.Plans(TINY, 1), plans.capacity(TINY, 1, 1)
    stores: dict[int, np.ndarray] = {}
    for step in range(60):
        plan = made[step]
        first = made.first(step, plan.size)
        window = first + (np.arange(held) - first) % held
        store = stores.setdefault(plan.size, window.copy())
        for number in plan.renewed:
            store[number % held] = number
        assert (store == window).all(), step
    assert len(stores) == 2 and all(store.max() > held for store in stores.values())


def untaught() -> reading.Reader:
    """Text encoders that have learned nothing, always the same."""
    torch.manual_seed(1)
    return reading.Reader()


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, course: Course = TINY) -> list[float]:
    """Train on a small course, asked to stop after so many questions whether to."""
    asked = iter(range(10_000))
    monkeypatch.setattr(learn.art, "load", lambda _device: red_squares())
    monkeypatch.setattr(autoencoder, "settled", small_vae)
    monkeypatch.setattr(learn, "asked_to_stop", lambda: next(asked) >= stop_after)
    monkeypatch.setattr(learn, "taught", untaught)
    return learn.train(alone(), course, folder, device="cpu")


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    known: vocabulary_module.Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first of two stages and started again, it has the same losses to the end."""
    whole = trained(tmp_path / "whole", monkeypatch, 10_000)
    parts = trained(tmp_path / "parts", monkeypatch, 8)
    assert 0 < len(parts) < len(whole) == 6
    parts += trained(tmp_path / "parts", monkeypatch, 10_000)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_text_encoders_come_in_taught_when_they_are_first_read(
    known: vocabulary_module.Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before, and only once; of a run that has not met them the weights come with them all the same."""
    trained(tmp_path, monkeypatch, 4)
    run = learn.Run(TINY, tmp_path, alone(), torch.device("cpu"), 0)
    taught = untaught().state_dict()

    def alike(reader: torch.nn.Module) -> bool:
        return all(torch.equal(value, taught[name]) for name, value in reader.state_dict().items())

    assert 0 < run.step < TINY.stages[0].steps and not alike(run.painter.reader)
    assert alike(learn.painter(TINY, tmp_path).reader)
    run.enter(1)
    assert alike(run.painter.reader) and alike(run.average.module.get_submodule("reader"))
    with torch.no_grad():
        run.painter.reader.first.get_input_embeddings().weight.add_(1)
    run.enter(1)
    assert not alike(run.painter.reader)


def test_a_grown_network_composes_as_the_one_it_grew_around() -> None:
    """Deep inside it sees what the inner one sees of the latents' means, and its estimate begins as the picture."""
    torch.manual_seed(0)
    inner = architecture.unet((32, 64, 128), architecture.WIDER, kernel=1)
    outer = architecture.unet((32, 32, 32, 64, 128), architecture.WIDER)
    growth.grow(outer, inner)
    noisy, states, pooled = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 256), torch.randn(1, 160)
    added = {"text_embeds": pooled, "time_ids": torch.full((1, 6), 256.0)}
    seen: list[torch.Tensor] = []
    for unet in (inner, outer):
        unet.up_blocks[2].resnets[-1].register_forward_hook(lambda _module, _given, made: seen.append(made))
    with torch.no_grad():
        inner(F.avg_pool2d(noisy, 4), torch.tensor([700]), states, added_cond_kwargs=added)
        made = outer(noisy, torch.tensor([700]), states, added_cond_kwargs=added).sample
    assert (seen[0] - seen[1]).abs().mean() < 0.1 * seen[0].abs().mean()
    assert (made - noisy).abs().mean() < 0.05
    with pytest.raises(ValueError, match="1x1"):
        growth.grow(outer, architecture.unet((32, 64, 128), architecture.WIDER))


def test_outer_levels_learn_alone_first(
    known: vocabulary_module.Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inner course learns on means of noise; around it the outer levels learn, and then all of them."""
    trained(tmp_path, monkeypatch, 10_000, TINY_INNER)
    inner = learn.painter(TINY_INNER, tmp_path)
    run = learn.Run(TINY_GROWN, tmp_path, alone(), torch.device("cpu"), 0)
    within = {id(p) for p in growth.inner_part(run.painter.unet, inner.unet)}
    assert len(within) == sum(1 for _ in inner.unet.parameters()) - 6  # but for the convolutions and norm at its ends

    def changed(since: dict[str, torch.Tensor]) -> tuple[bool, bool]:
        """Whether any inner weight is another now, and whether any outer one is."""
        moved = [p for name, p in run.painter.unet.named_parameters() if not torch.equal(p, since[name])]
        return any(id(p) in within for p in moved), any(id(p) not in within for p in moved)

    began = {name: p.detach().clone() for name, p in run.painter.unet.named_parameters()}
    monkeypatch.setattr(learn, "asked_to_stop", lambda: run.step >= 2)
    learn.carry_on(run, 1e9)
    assert run.stage == 0 and changed(began) == (False, True)
    monkeypatch.setattr(learn, "asked_to_stop", lambda: False)
    learn.carry_on(run, 1e9)
    assert run.stage == 1 and changed(began) == (True, True)


def test_what_is_set_down_does_not_tell_the_noise(known: vocabulary_module.Vocabulary, tmp_path: Path) -> None:
    """The numbers in place of words are other lots than the noise of the same step."""
    told = cells.told(red_squares(), tmp_path / "told.pt")
    words = told.whole(torch.tensor([cells.UNSAID]), 0.5, 7 + learn.APART)[0, :4].flatten()
    noise = learn.drawn_noise((1, 4, 16, 16), 0.0, 7, torch.device("cpu")).flatten()
    assert abs(float(torch.corrcoef(torch.stack([words, noise]))[0, 1])) < 0.2
    again = cells.told(Art({side: drawn * 0 for side, drawn in red_squares().levels.items()}), tmp_path / "told.pt")
    assert torch.equal(again.cells, told.cells)  # as they were written down


def test_the_core_of_the_table_may_come_more_often_than_the_rest() -> None:
    """Its share is what a stage says, and the others still come."""
    shown = replace(plans.material(CPU, 1, 0, 0), core=0.9)
    subjects_shown = [thing.subject for number in range(300) for thing in shown.scene(number).things]
    assert 0.85 < np.mean([subject < CORE for subject in subjects_shown]) < 0.99


def test_short_arithmetic_is_used_where_the_processor_has_it() -> None:
    """A product is bfloat16 there, and float32 elsewhere or where it is not wanted."""
    has, ones = torch.cpu._is_avx512_bf16_supported(), torch.ones(2, 2)
    for wanted in (True, False):
        with short(CPU_DEVICE, wanted):
            assert (ones @ ones).dtype == (torch.bfloat16 if has and wanted else torch.float32)


def test_lessons_that_are_not_over_are_not_taken_for_taught(
    known: vocabulary_module.Vocabulary, tmp_path: Path
) -> None:
    """A state in the middle says how far it is; one at the end is the reader."""
    state = {"average": untaught().state_dict(), "step": 3, "steps": 4}
    checkpoint.save(tmp_path / "reading.pt", state)
    with pytest.raises(ValueError, match="3 of 4 steps"):
        reading.trained(tmp_path / "reading.pt")
    checkpoint.save(tmp_path / "reading.pt", state | {"step": 4})
    assert isinstance(reading.trained(tmp_path / "reading.pt"), reading.Reader)


def test_the_reading_lesson_asks_for_what_the_caption_says(known: vocabulary_module.Vocabulary) -> None:
    """Each meaning is within its kind, and a scene without things has none."""
    ids, _, meant = reading.lesson(0, 64, 8)
    kinds = (cells.NOTHING + 1, cells.NOTHING + 1, *cells.TELLABLE)
    assert len(ids) == 64 and all(int(meant[:, at].max()) < of for at, of in enumerate(kinds))
    empty = Scene((), 0, Ground(-1, 1, 1, True, 0), Frame(64, 64))
    assert cells.meaning(empty)[:2] == (cells.NOTHING, cells.NOTHING)
    assert all(unsaid < of for unsaid, of in zip(cells.UNSAID, kinds, strict=True))


def test_reading_begins_with_the_looks_of_what_is_named(known: vocabulary_module.Vocabulary) -> None:
    """The tokens of a name add up to its drawing: two that look alike are near each other, and others are not."""
    dice = torch.Generator().manual_seed(0)
    small = torch.randint(0, 255, (len(subjects()), 4, 96, 96), dtype=torch.uint8, generator=dice)
    small[1] = small[0]
    reader = reading.Reader()
    drawn = small.repeat_interleave(len(STYLES), 0)
    reading.begin(reader, art.Art(dict.fromkeys(LEVELS, drawn)))
    rows = reader.second.get_input_embeddings().weight

    def said(name: str) -> torch.Tensor:
        return rows[known.rows_of(name)].sum(0)

    first, alike, other = (said(subjects()[at].name) for at in (0, 1, 2))
    assert (first - alike).norm() < 0.5 * (first - other).norm()


def test_a_crop_s_lots_and_a_scene_s_are_the_same_for_the_same_seed() -> None:
    """Scenes are decided by the generator alone."""
    assert some_scenes(20, 4) == some_scenes(20, 4) != some_scenes(20, 5)
    assert scene.PLACES.keys() <= set(cells.SAID)
