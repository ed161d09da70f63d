"""Embeddings that LoRA files bring: read where they fit, told where they do not; one word never means two things."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from impasto.engine.words import words_of
from impasto.errors import InvalidInput
from impasto.lora.apply import LoraFile
from impasto.lora.bundles import MAX_WORDS
from impasto.lora.cache import contents_bytes
from impasto.lora.contents import LoraContents
from impasto.lora.formats import read_lora
from impasto.lora.keys import Target, TargetNames
from impasto.lora.report import LoraReport
from impasto.models.inversion import read_embedding
from impasto.types import EmbeddingRef
from impasto.wordvectors import MAX_VECTORS

WIDTHS = (6, 10)
MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
UNET = {Target("unet", MODULE): (8, 6)}
TEXT = {
    Target("text_encoder", "encoder.layers.0.mlp.fc1"): (12, WIDTHS[0]),
    Target("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"): (20, WIDTHS[1]),
}
MODEL = TargetNames(UNET | TEXT)


def vectors(n=2, widths=WIDTHS, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(n, width, generator=generator) for width in widths)
    return dict(zip(("clip_l", "clip_g"), rows, strict=True))


def bundled(word="ink", tensors=None) -> dict[str, torch.Tensor]:
    return {f"bundle_emb.{word}.{part}": tensor for part, tensor in (tensors or vectors()).items()}


def read(folder: Path, *bundles: dict[str, torch.Tensor], model=MODEL, name="a.safetensors") -> LoraContents:
    """Read a LoRA of one module with these tensors beside it."""
    tensors = {f"unet.{MODULE}.lora_down.weight": torch.ones(2, 6), f"unet.{MODULE}.lora_up.weight": torch.ones(8, 2)}
    for bundle in bundles:
        tensors |= bundle
    save_file(tensors, folder / name)
    return read_lora(folder / name, model, "loras.0.path")


@pytest.mark.parametrize("word", ["ink", "<s0>", "a.b", "my word", "lora_A", "猫", "clip_l"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_word_is_read_with_its_vectors(tmp_path, word, dtype):
    """Whatever the word looks like and whatever floats; it is no longer among what was ignored."""
    written = {part: tensor.to(dtype) for part, tensor in vectors().items()}

    contents = read(tmp_path, bundled(word, written))

    [bundle] = contents.bundles
    assert (bundle.word, bundle.problem) == (word, "")
    for ours, theirs in zip(bundle.vectors, written.values(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())
    assert contents.ignored == contents.unmatched == ()
    report = LoraReport.of(contents, "a")
    assert report.embeddings == (word,)
    assert ("embeddings", word) in report.rows()


def test_vectors_stay_when_the_file_is_written_over(tmp_path):
    """They are copies, not the file's pages; and they count among what is held in memory."""
    contents = read(tmp_path, bundled())
    path = tmp_path / "a.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(contents.bundles[0].vectors[1], vectors()["clip_g"])
    assert contents_bytes(contents) - contents_bytes(read(tmp_path)) > 4 * 2 * sum(WIDTHS)


def test_a_bare_row_is_one_vector(tmp_path):
    """``[w]`` is ``[1, w]``."""
    [bundle] = read(tmp_path, bundled(tensors={p: t[0].clone() for p, t in vectors().items()})).bundles
    assert [tuple(rows.shape) for rows in bundle.vectors] == [(1, 6), (1, 10)]


NAN = vectors() | {"clip_g": torch.full((2, 10), float("nan"))}
UNFIT = {
    "another width": (vectors(2, (768, 1280)), r"not for this model: its vectors are \(768, 1280\) wide"),
    "swapped": (vectors(2, (10, 6)), "not for this model"),
    "NaN": (NAN, "numbers that are not finite"),
    "infinity": (vectors(1) | {"clip_l": torch.full((1, 6), 1e9).half()}, "numbers that are not finite"),
    "uneven": (vectors() | {"clip_l": torch.ones(3, 6)}, "3 vectors for the first text encoder and 2 for the second"),
    "too many": (vectors(MAX_VECTORS + 1), "76 vectors"),
    "three axes": (vectors() | {"clip_l": torch.ones(1, 2, 6)}, "of the shapes"),
    "whole numbers": ({p: t.to(torch.int64) for p, t in vectors().items()}, "whole numbers"),
    "one encoder": ({"clip_l": torch.ones(1, 6)}, "not for SDXL"),
    "SD 1.5": ({"string_to_param.*": torch.ones(1, 768)}, "not for SDXL"),
    "SD 3": (vectors() | {"t5": torch.ones(1, 4096)}, "not for SDXL"),
    "at the output": ({"clip_l_out": torch.ones(1, 6), "clip_g_out": torch.ones(1, 10)}, "encoders' output"),
    "at both ends": (vectors() | {"clip_g_out": torch.ones(1, 10)}, "encoders' output"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_a_word_that_cannot_be_used_is_told_and_the_rest_applies(tmp_path, kind):
    """It never stops the LoRA or a good word beside it: a warning says why, and its keys stand among the ignored."""
    tensors, reason = UNFIT[kind]
    contents = read(tmp_path, bundled("bad", tensors), bundled("good"))

    report = LoraReport.of(contents, "a")

    assert set(contents.ignored) == {f"bundle_emb.bad.{part}" for part in tensors}
    assert (report.embeddings, report.modules) == (("good",), 1)
    [warning] = report.warnings
    assert warning.startswith("The embedding for 'bad' that it brings was not applied: it ")
    assert re.search(reason, warning)


def test_words_without_end_are_cut(tmp_path):
    """A file of very many words costs no more than some of them."""
    contents = read(tmp_path, *(bundled(f"w{i:03}") for i in range(MAX_WORDS + 5)))
    report = LoraReport.of(contents, "a")
    assert len(report.embeddings) == MAX_WORDS
    [warning] = report.warnings
    assert "one of more than 64 words" in warning


def test_a_model_without_both_text_encoders_takes_no_words(tmp_path):
    """A refiner's file held against a UNet alone says so."""
    contents = read(tmp_path, bundled(), model=TargetNames(UNET))
    [warning] = LoraReport.of(contents, "a").warnings
    assert "has not both text encoders" in warning


def lora(contents, position=0, scale=1.0, text_scale=None) -> tuple[LoraFile, LoraContents]:
    file = LoraFile(Path(f"{position}.safetensors"), 1, 2, scale, text_scale, f"loras.{position}.path")
    return file, contents


def words(*loras, own=()):
    files, contents = zip(*loras, strict=True)
    return words_of(own, files, contents)


SCALES = {(1.0, None): True, (0.1, None): True, (-1.0, None): True, (0.0, None): False,
          (0.0, 1.0): True, (1.0, 0.0): False}  # fmt: skip


@pytest.mark.parametrize(("scale", "text_scale"), SCALES)
def test_a_word_is_there_whole_or_not_at_all(tmp_path, scale, text_scale):
    """Any strength for the text encoders but 0 gives the vectors as they were learned; at 0 a note says why not."""
    found = words(lora(read(tmp_path, bundled()), scale=scale, text_scale=text_scale))

    if SCALES[scale, text_scale]:
        [word] = found.prompt("an ink fox", "plain").embeddings
        assert torch.equal(read_embedding(word, WIDTHS)[0], vectors()["clip_l"])
        assert (found.used, found.notes) == ((("ink",),), ((),))
    else:
        assert found.brought == ()
        [[note]] = found.notes
        assert note == "Its embedding for 'ink' was not applied: its scale for the text encoders is 0."


def test_of_two_loras_with_one_word_the_first_has_it(tmp_path):
    """The other's report names the first; words of its own it keeps. A LoRA that is off takes no word."""
    first = read(tmp_path, bundled(tensors=vectors(1, seed=1)))
    second = read(tmp_path, bundled(tensors=vectors(3, seed=2)), bundled("wash"), name="b.safetensors")

    both = words(lora(first, 0), lora(second, 1))
    assert both.used == (("ink",), ("wash",))
    assert both.notes[0] == ()
    assert both.notes[1] == (
        "Its embedding for 'ink' was not applied: loras.0 brings that word, too, and comes first.",
    )
    assert [len(word.vectors[0]) for word in both.brought] == [1, 2]
    assert words(lora(first, 0, scale=0), lora(second, 1)).used == ((), ("ink", "wash"))


def test_a_file_that_the_request_names_goes_before_a_loras_word(tmp_path):
    """Who says what a word means is right."""
    save_file(vectors(4), tmp_path / "own.safetensors")
    own = [EmbeddingRef("ink", str(tmp_path / "own.safetensors"))]
    found = words(lora(read(tmp_path, bundled())), own=own)
    assert found.used == ((),)
    assert found.notes[0] == ("Its embedding for 'ink' was not applied: embeddings.0 has that word.",)
    assert found.prompt("ink", "plain").embeddings == found.own


def test_a_prompt_is_known_by_the_words_in_it(tmp_path):
    """Prompts without the word are equal with and without the LoRA, so their embedding is cached once; with it, not."""
    path = tmp_path / "a.safetensors"
    contents = read(tmp_path, bundled(), bundled("wash"))
    one, none = words(lora(contents)), words_of((), (), ())
    replaced = words((LoraFile(path, 2, 2, 1.0), contents))

    assert one.prompt("a fox", "plain") == none.prompt("a fox", "plain")
    assert one.prompt("ink", "plain") != none.prompt("ink", "plain")
    assert one.prompt("ink", "plain") == words(lora(contents)).prompt("ink", "plain")
    assert hash(one.prompt("ink", "plain")) == hash(words(lora(contents)).prompt("ink", "plain"))
    assert one.prompt("ink", "plain") != replaced.prompt("ink", "plain"), "another file, another meaning"
    assert [word.token for word in one.prompt("(ink:1.2) inks", "weighted").embeddings] == ["ink"]
    unreadable = one.prompt("(ink:99)", "weighted")
    assert len(unreadable.embeddings) == 2, "whoever encodes it says what is wrong"


def test_a_missing_file_of_the_request_is_still_an_error(tmp_path):
    """LoRAs' words excuse nothing."""
    with pytest.raises(InvalidInput, match="was not found"):
        words(lora(read(tmp_path, bundled())), own=[EmbeddingRef("a", "nowhere")])
