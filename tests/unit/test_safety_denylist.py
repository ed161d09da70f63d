"""The operator's deny-list: whole words and phrases, however they are written."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.errors import ConfigError, InvalidInput
from impasto.safety.denylist import DenyList

LIST = DenyList(["kitten", "red fox", "Straße", "c3po", "кот"])


def refused(prompt):
    try:
        LIST.check("prompt", prompt)
    except InvalidInput:
        return True
    return False


@pytest.mark.parametrize(
    "prompt",
    ["a kitten", "KITTEN", "kitten.", "a_kitten_", "the kitten's milk",
     "ｋｉｔｔｅｎ", "kit\u200bten", "kit\u00adten", "𝐤𝐢𝐭𝐭𝐞𝐧",
     "red fox", "Red   FOX", "red-fox", "red,\nfox", "(red) fox", "STRASSE", "straße", "C3PO", "Кот на окне"],
)  # fmt: skip
def test_a_listed_word_is_found_in_every_spelling(prompt):
    """Case, width, invisible characters, punctuation and line breaks do not hide it."""
    assert refused(prompt)


@pytest.mark.parametrize(
    "prompt", ["kittens", "smitten", "redfox", "a fox, red", "red", "(red:1.2) fox", "котик", "c3 po", "", "…"]
)
def test_parts_of_words_and_of_phrases_are_not_found(prompt):
    """Only whole words count, and of a phrase all of them in their order."""
    assert not refused(prompt)


@given(st.text(), st.text())
def test_a_listed_word_is_found_between_anything(before, after):
    """Whatever stands around it, as long as it stands alone."""
    assert refused(f"{before} , kitten , {after}")


def test_it_is_read_from_a_file(tmp_path):
    """An entry a line; empty lines and comments do not count, and a byte-order mark does no harm."""
    file = tmp_path / "words.txt"
    file.write_text("\ufeffkitten\n\n# a comment\n  red fox  \n", encoding="utf-8")
    entries = DenyList.load(file)
    for prompt in ("kitten", "red fox"):
        with pytest.raises(InvalidInput, match=prompt):
            entries.check("prompt", prompt)
    entries.check("prompt", "a comment")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"kitten\n***\n"])
def test_a_file_that_cannot_be_used_stops_start_up(tmp_path, content):
    """Missing, not text, or with a line that could never be found: the message names the setting."""
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="prompt_denylist"):
        DenyList.load(file)


def test_long_lists_and_prompts_are_quick():
    """The longest prompt against 20 000 entries that nearly fit takes less than a quarter of a second."""
    entries = DenyList(f"word {i}" for i in range(20_000))
    start = time.perf_counter()
    entries.check("prompt", "word " * 4000)
    assert time.perf_counter() - start < 0.25


def test_an_empty_list_refuses_nothing():
    """The default."""
    DenyList().check("prompt", "kitten")
