"""The weighted syntax loses no text and never fails but by name; embedding files are what they say or are refused."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from impasto.errors import InvalidInput
from impasto.models.inversion import EmbeddingFile, read_embedding, resolve_embeddings
from impasto.models.prompts import MAX_WEIGHT, parse, spot
from impasto.types import LIMITS, EmbeddingRef
from impasto.wordvectors import MAX_VECTORS

UP, DOWN = 1.1, 1 / 1.1
WIDTHS = (768, 1280)

SYNTAX = {
    "a cat": [[("a cat", 1)]],
    "a (cat)": [[("a ", 1), ("cat", UP)]],
    "a [cat] b": [[("a ", 1), ("cat", DOWN), (" b", 1)]],
    "(cat:1.3)": [[("cat", 1.3)]],
    "(cat : 1.3 )": [[("cat ", 1.3)]],
    "(cat:.5)(dog:2.)(fox:-1)(owl:+1e-1)": [[("cat", 0.5), ("dog", 2), ("fox", -1), ("owl", 0.1)]],
    "(cat:0)": [[("cat", 0)]],
    "((cat))": [[("cat", UP * UP)]],
    "((cat:1.2))": [[("cat", UP * 1.2)]],
    "(a (cat:1.2) b:0.5)": [[("a ", 0.5), ("cat", 0.5 * 1.2), (" b", 0.5)]],
    "([cat])": [[("cat", UP * DOWN)]],
    "[cat:1.5]": [[("cat:1.5", DOWN)]],  # square brackets take no number
    "(cat:big)": [[("cat:big", UP)]],
    "(a:b:1.2)": [[("a:b", 1.2)]],
    "(embedding:style:1.2)": [[("embedding:style", 1.2)]],
    "ratio 16:9": [[("ratio 16:9", 1)]],
    r"a \(cat\) \[b\]": [[("a (cat) [b]", 1)]],
    r"(cat \(1920\):1.2)": [[("cat (1920)", 1.2)]],
    r"a\b \:": [[(r"a\b \:", 1)]],  # a backslash before anything else is one
    "a (cat": [[("a (cat", 1)]],
    "a cat) b]": [[("a cat) b]", 1)]],
    "smile :) (:": [[("smile :) (:", 1)]],
    "(a [b) c]": [[("a [b", UP), (" c]", 1)]],
    "[a (b] c)": [[("a (b", DOWN), (" c)", 1)]],
    "((a)": [[("(", 1), ("a", UP)]],
    "a () b": [[("a  b", 1)]],
    "(cat:1) dog": [[("cat dog", 1)]],
    "": [[]],
    "   ": [[("   ", 1)]],
    "a BREAK b": [[("a ", 1)], [(" b", 1)]],
    "(a BREAK b:1.2) c": [[("a ", 1.2)], [(" b", 1.2), (" c", 1)]],
    "BREAK a BREAK BREAK": [[(" a ", 1)]],
    "BREAK": [[]],
    "BREAKFAST break BREAK_IN": [[("BREAKFAST break BREAK_IN", 1)]],
}


@pytest.mark.parametrize("prompt", SYNTAX)
def test_the_syntax_means_what_artists_expect(prompt):
    """Brackets, numbers, nesting, escapes, stray brackets and BREAK, one line each."""
    assert parse(prompt) == tuple(
        tuple((text, pytest.approx(weight)) for text, weight in chunk) for chunk in SYNTAX[prompt]
    )


@given(st.text())
@example("\\")
def test_nothing_but_invalid_input_is_ever_raised(text):
    """Any text at all is a prompt, or its weights are out of range."""
    try:
        chunks = parse(text)
    except InvalidInput:
        return
    assert chunks
    assert all(piece and abs(weight) <= MAX_WEIGHT for chunk in chunks for piece, weight in chunk)


def letters(text: str) -> str:
    return "".join(c for c in text if c in "xyz")


@given(st.text(alphabet="xyz()[]\\:.19 -", max_size=60))
def test_no_text_is_lost(text):
    """However the brackets stand, the words come out in their order."""
    try:
        chunks = parse(text)
    except InvalidInput:
        return
    assert letters("".join(piece for chunk in chunks for piece, _ in chunk)) == letters(text)


@given(st.text(alphabet="xyz()[]", max_size=40))
def test_only_brackets_with_a_partner_go(text):
    """What remains is the text without as many opening as closing brackets."""
    [chunk] = parse(text)
    left = "".join(piece for piece, _ in chunk)
    for one, other in ("()", "[]"):
        assert text.count(one) - left.count(one) == text.count(other) - left.count(other)


@given(st.text(min_size=1).filter(lambda text: not set("()[]\\") & set(text) and "BREAK" not in text))
def test_a_prompt_without_special_characters_is_one_piece(text):
    """The switch changes nothing for those who do not use the syntax."""
    assert parse(text) == (((text, 1.0),),)


@given(st.text().filter(lambda text: "BREAK" not in text))
def test_escaped_text_comes_back_as_it_was(text):
    """A backslash before each bracket writes any text."""
    escaped = "".join("\\" + c if c in "()[]" else c for c in text)
    assert "".join(piece for chunk in parse(escaped) for piece, _ in chunk) == text


nested = st.recursive(
    st.sampled_from(["x", "y "]).map(lambda text: (text, [(text, 1.0)])),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(
            lambda items: ("".join(text for text, _ in items), [piece for _, pieces in items for piece in pieces])
        ),
        st.tuples(inner, st.sampled_from([0.5, 1.2, -1.0])).map(
            lambda item: (f"({item[0][0]}:{item[1]})", [(text, weight * item[1]) for text, weight in item[0][1]])
        ),
        inner.map(lambda item: (f"[{item[0]}]", [(text, weight / 1.1) for text, weight in item[1]])),
    ),
    max_leaves=6,
)


@given(nested)
def test_weights_multiply_through_any_nesting(written):
    """Each word weighs the product of the brackets around it."""
    prompt, expected = written
    by_character = [(c, weight) for chunk in parse(prompt) for text, weight in chunk for c in text]
    assert by_character == [(c, pytest.approx(weight)) for text, weight in expected for c in text]


@pytest.mark.parametrize("weight", ["nan", "inf", "-Infinity", "10.01", "-11", "1e99", "9" * 400])
def test_a_weight_out_of_range_is_named(weight):
    """The message says which words and what is allowed."""
    with pytest.raises(InvalidInput, match=r"prompt gives 'cat' the weight .* from -10 to 10") as caught:
        parse(f"a (cat:{weight})")
    assert caught.value.field == "prompt"


def test_the_product_of_nested_weights_counts():
    """Brackets in brackets can not climb over the limit, and may go over it on the way."""
    with pytest.raises(InvalidInput, match="the weight 11"):
        parse("((cat:10))")
    assert parse("((cat:20):0.1)") == ((("cat", pytest.approx(2)),),)


@pytest.mark.parametrize(
    "pattern",
    ["(", "()", "[)", "(:1)", r"\(", "(x:", " BREAK ", "nested", "digits", "spaces"],
)
def test_the_longest_prompt_is_read_at_once(pattern):
    """No text makes the parser slow: a second would already be an attack."""
    size = LIMITS.max_prompt_chars
    inside = {"nested": "x", "digits": "x:" + "1" * (size // 2), "spaces": "x:" + " " * (size // 2)}
    text = pattern * (size // len(pattern))
    if pattern in inside:
        depth = (size - len(inside[pattern])) // 2
        text = "[" * depth + "(" + inside[pattern] + ")" + "]" * depth + "(" * depth + inside[pattern] + ")" * depth
    start = time.perf_counter()
    with suppress(InvalidInput):
        parse(text)
    assert time.perf_counter() - start < 1


SPOTS = {
    "a foo b": [("a ", None), ("foo", "foo"), (" b", None)],
    "foo, foo": [("foo", "foo"), (", ", None), ("foo", "foo")],
    "foo-bar food xfoo Foo": [("foo-bar", "foo-bar"), (" food xfoo Foo", None)],
    "embedding:foo embedding:<s0>": [("embedding:foo", "foo"), (" ", None), ("embedding:<s0>", "<s0>")],
    "a<s0>b": [("a", None), ("<s0>", "<s0>"), ("b", None)],
    "embedding:other": [("embedding:other", None)],
    "unembedding:foo": [("unembedding:", None), ("foo", "foo")],
    "": [],
}


@pytest.mark.parametrize("text", SPOTS)
def test_words_of_embeddings_are_found_whole(text):
    """Whole words, the longest first, case kept, with or without ``embedding:``."""
    assert spot(text, ["foo", "foo-bar", "<s0>"]) == tuple(SPOTS[text])


@given(st.text(), st.lists(st.text(min_size=1), max_size=3))
def test_spotting_loses_no_text(text, words):
    """The pieces put together are the text, whatever the words."""
    assert "".join(piece for piece, _ in spot(text, words)) == text


def test_prompts_are_read_without_torch():
    """The server may check a prompt before any worker sees it."""
    code = "import sys, impasto.models.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(path, tensors, token="foo") -> EmbeddingFile:
    """Write a file and look it up."""
    save_file(tensors, path)
    [found] = resolve_embeddings([EmbeddingRef(token, str(path))])
    return found


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_each_layout_and_number_format_is_read(tmp_path, keys, dtype):
    """Both spellings, any float; the name of the file does not matter (cog-sdxl's is ``embeddings.pti``)."""
    written = [vectors(2, width).to(dtype) for width in WIDTHS]
    file = saved(tmp_path / "embeddings.pti", dict(zip(keys, written, strict=True)))

    read = read_embedding(file, WIDTHS)

    for ours, theirs in zip(read, written, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


def test_a_single_vector_may_be_a_bare_row(tmp_path):
    """``[w]`` is ``[1, w]``; for a refiner the second encoder's vectors are enough."""
    file = saved(tmp_path / "a", {"clip_l": vectors(768), "clip_g": vectors(1280)})

    assert [tuple(t.shape) for t in read_embedding(file, WIDTHS)] == [(1, 768), (1, 1280)]
    [second] = read_embedding(file, (1280,))
    assert torch.equal(second[0], vectors(1280))


def sdxl(n=1, **more):
    return {"clip_l": vectors(n, 768), "clip_g": vectors(n, 1280)} | more


REFUSED = {
    "SD 1.5": ({"emb_params": vectors(2, 768)}, "'emb_params', 768 wide, as for Stable Diffusion 1.*needs clip_l"),
    "diffusers, one encoder": ({"<cat-toy>": vectors(1280)}, "vectors for one text encoder.*1280 wide"),
    "half of one": ({"clip_l": vectors(1, 768)}, "not for SDXL.*one text encoder"),
    "SD 3": (sdxl(t5xxl=vectors(1, 4096)), "holds 't5xxl' where only clip_l and clip_g belong"),
    "LoRA": ({"lora_unet_x.lora_down.weight": vectors(4, 4)}, "is a LoRA: give it in loras"),
    "checkpoint": ({"model.diffusion_model.x": vectors(4, 4)}, "is a checkpoint, not"),
    "nothing": ({}, "holds 'no tensors'"),
    "another width": ({"clip_l": vectors(1, 64), "clip_g": vectors(1, 96)}, r"\(64, 96\) wide.*\(768, 1280\)"),
    "swapped": ({"clip_l": vectors(1, 1280), "clip_g": vectors(1, 768)}, "not for this model"),
    "too many": (sdxl(MAX_VECTORS + 1), "has 76 vectors; a window of the prompt holds 75"),
    "uneven": (sdxl() | {"clip_l": vectors(3, 768)}, "3 vectors for the first text encoder and 1 for the second"),
    "no rows": (sdxl() | {"clip_l": torch.zeros(0, 768)}, "of the shapes"),
    "three axes": (sdxl() | {"clip_l": vectors(1, 1, 768)}, "of the shapes"),
    "NaN": (sdxl() | {"clip_g": torch.full((1, 1280), float("nan"))}, "not finite"),
    "infinity": (sdxl() | {"clip_g": torch.full((1, 1280), float("inf"))}, "not finite"),
    "integers": (sdxl() | {"clip_l": torch.ones(1, 768, dtype=torch.int64)}, "number format"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_any_other_file_is_refused_for_what_it_is(tmp_path, kind):
    """The error names the request's field and the reason."""
    tensors, reason = REFUSED[kind]
    file = saved(tmp_path / "a.safetensors", tensors)

    with pytest.raises(InvalidInput, match=reason) as caught:
        read_embedding(file, WIDTHS)

    assert caught.value.field == "embeddings.0.path"


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_is_refused_unread(tmp_path, modern):
    """Whatever it is called; the remedy is in the message."""
    path = tmp_path / "a.safetensors"
    torch.save(sdxl(), path, _use_new_zipfile_serialization=modern)
    [file] = resolve_embeddings([EmbeddingRef("foo", str(path))])

    with pytest.raises(InvalidInput, match=r"is a pickle.*convert it to \.safetensors"):
        read_embedding(file, WIDTHS)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_file_is_named(tmp_path, keep):
    """A download that broke off is not half an embedding."""
    path = tmp_path / "a.safetensors"
    saved(path, sdxl())
    path.write_bytes(path.read_bytes()[:keep])
    [file] = resolve_embeddings([EmbeddingRef("foo", str(path))])

    with pytest.raises(InvalidInput, match="not a whole safetensors file"):
        read_embedding(file, WIDTHS)


def test_files_are_looked_up_when_asked_for(tmp_path):
    """A missing file and a word given twice are errors that name their place in the list."""
    path = tmp_path / "a.safetensors"
    saved(path, sdxl())
    good = EmbeddingRef("foo", str(path))

    with pytest.raises(InvalidInput, match=r"embeddings\.1\.path was not found: 'b.safetensors'"):
        resolve_embeddings([good, EmbeddingRef("bar", str(tmp_path / "b.safetensors"))])
    with pytest.raises(InvalidInput, match=r"embeddings\.1\.token is given twice: 'foo'"):
        resolve_embeddings([good, good])


def test_a_replaced_file_is_another_embedding(tmp_path):
    """What was read stays what it was, though the file is written over; the new content is read anew."""
    path = tmp_path / "a.safetensors"
    first = saved(path, sdxl())
    before = read_embedding(first, WIDTHS)[0].clone()
    unread = EmbeddingFile(first.token, first.path, first.modified, first.size + 1, first.field)
    other = saved(tmp_path / "b.safetensors", sdxl() | {"clip_l": vectors(1, 768, seed=1)})
    path.write_bytes(other.path.read_bytes())  # the same file on disk, not a new one of the same name
    os.utime(path, ns=(first.modified + 1, first.modified + 1))
    [second] = resolve_embeddings([EmbeddingRef("foo", str(path))])

    assert torch.equal(read_embedding(first, WIDTHS)[0], before)
    assert not torch.equal(read_embedding(second, WIDTHS)[0], before)
    with pytest.raises(InvalidInput, match="was replaced"):
        read_embedding(unread, WIDTHS)
