"""Our text encoding equals diffusers' on the same encoders, and its windows, weights and embeddings are what they say.

Tolerance: 1e-5 of the largest state, in float32. Both the built-in model and a random one, with another tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from impasto.errors import InvalidInput
from impasto.models.catalog import BUILTIN_FOLDER
from impasto.models.inversion import EmbeddingFile, resolve_embeddings
from impasto.models.text import MAX_WINDOWS, Prompt, TextEncoders, Unit, substituted
from impasto.types import EmbeddingRef
from tests.random_sdxl import save_random_sdxl

TOLERANCE = 1e-5
CPU = torch.device("cpu")
WINDOW, ROOM = 77, 75


@pytest.fixture(scope="module", params=["random", "builtin"])
def folder(request, tmp_path_factory) -> Path:
    """A model folder; every test runs on both."""
    if request.param == "builtin":
        return BUILTIN_FOLDER
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "random-sdxl")


def load_parts(folder: Path) -> tuple[tuple, tuple]:
    """Both encoders and tokenizers, by transformers."""
    encoders = (
        CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", local_files_only=True),
    )
    names = ("tokenizer", "tokenizer_2")
    return encoders, tuple(CLIPTokenizer.from_pretrained(folder / name, local_files_only=True) for name in names)


@pytest.fixture(scope="module")
def parts(folder) -> tuple[tuple, tuple]:
    return load_parts(folder)


@pytest.fixture(scope="module")
def text(parts) -> TextEncoders:
    """Ours, on the folder's encoders."""
    return TextEncoders(*parts)


def load_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """diffusers' pipeline, without the parts that draw."""
    return StableDiffusionXLPipeline.from_pretrained(
        folder, unet=None, vae=None, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )


@pytest.fixture(scope="module")
def pipeline(folder) -> StableDiffusionXLPipeline:
    return load_pipeline(folder)


def theirs(pipeline, prompt: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False)
    return tokens[0], pooled[0]


def plain(text: TextEncoders, prompt: str, *embeddings: EmbeddingFile) -> tuple[Tensor, Tensor]:
    return text.encode(Prompt(prompt, "plain", embeddings), CPU)


def weighted(text: TextEncoders, prompt: str, *embeddings: EmbeddingFile) -> tuple[Tensor, Tensor]:
    return text.encode(Prompt(prompt, "weighted", embeddings), CPU)


def assert_close(ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()


def assert_equal(ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a, b)


def words(count: int, start: int = 0) -> str:
    """Words of one token each, by either tokenizer."""
    return " ".join("abcdefghijklmnopqrstuvwxyz"[(start + i) * 7 % 26] for i in range(count))


@pytest.fixture
def learned(tmp_path, text):
    """Writes an embedding of ``n`` random vectors and returns its file and tensors."""

    def write(token: str, n: int, seed: int = 0) -> tuple[EmbeddingFile, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.randn(n, width, generator=generator) for width in text.widths]
        tensors = dict(zip(("clip_l", "clip_g"), vectors, strict=True))
        path = tmp_path / f"{seed}-{n}.safetensors"
        save_file(tensors, path)
        [file] = resolve_embeddings([EmbeddingRef(token, str(path))])
        return file, tensors

    return write


PROMPTS = ["a red fox on a blue background", "", "A  (cat:1.2) [b] BREAK!", "don't\nstop, é", words(ROOM)]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_within_a_window_equals_diffusers(text, pipeline, prompt):
    """Plain prompts give diffusers' states and pooled state; brackets are text."""
    assert_close(plain(text, prompt), theirs(pipeline, prompt))


def test_the_comparison_can_fail(text, pipeline):
    """One other word is outside the tolerance."""
    with pytest.raises(AssertionError):
        assert_close(plain(text, "a red fox"), theirs(pipeline, "a red box"))


def test_the_widths_are_the_encoders(text, parts):
    """States stand side by side, as wide as both encoders."""
    encoders, _ = parts
    assert text.widths == tuple(encoder.config.hidden_size for encoder in encoders)
    assert plain(text, "a cat")[0].shape == (WINDOW, sum(text.widths))


@pytest.mark.parametrize("count", [ROOM + 1, 2 * ROOM, 2 * ROOM + 10])
def test_each_window_of_a_long_prompt_is_encoded_as_if_alone(text, count):
    """The windows are cut at 75 tokens, and the pooled state is the first one's."""
    tokens, pooled = plain(text, words(count))

    alone = [plain(text, words(min(ROOM, count - i), i)) for i in range(0, count, ROOM)]

    assert_close((tokens, pooled), (torch.cat([window for window, _ in alone]), alone[0][1]))


def test_a_refiner_has_the_second_encoder_alone(text, parts, learned):
    """One encoder gives its own share of the states, and the same pooled state, with embeddings and weights too."""
    encoders, tokenizers = parts
    alone = TextEncoders(encoders[1:], tokenizers[1:])
    file, _ = learned("foo", 2)

    for prompt in ("a cat", words(100), "a (foo:1.3) BREAK b"):
        tokens, pooled = weighted(text, prompt, file)
        assert_equal(weighted(alone, prompt, file), (tokens[:, text.widths[0] :], pooled))


@pytest.mark.parametrize("prompt", ["", "a red fox", words(100), "a (cat:1) b"])
def test_weights_of_one_change_no_bit(text, prompt):
    """The weighted syntax without weights is the plain one."""
    assert_equal(weighted(text, prompt), plain(text, prompt.replace("(", "").replace(":1)", "")))


@pytest.mark.parametrize("weight", [-1, 0, 0.5, 1.3, 2])
def test_a_weight_moves_states_along_the_line_from_the_empty_prompt(text, weight):
    """Only the weighted words' states move, by the formula; all others and the pooled state stay bit for bit."""
    tokens, pooled = weighted(text, f"a (b c:{weight}) d")

    base, base_pooled = plain(text, "a b c d")
    empty, _ = plain(text, "")
    moved = [2, 3]  # after the start and "a"
    others = [i for i in range(WINDOW) if i not in moved]
    expected = empty[moved] + weight * (base[moved] - empty[moved])
    assert_close((tokens[moved], tokens[moved]), (expected, expected))
    assert torch.equal(tokens[others], base[others])
    assert torch.equal(pooled, base_pooled)


def test_words_of_weight_zero_are_the_empty_prompt(text):
    """At every position of the text, in each window."""
    tokens, _ = weighted(text, f"({words(ROOM + 20)}:0)")

    empty, _ = plain(text, "")
    assert torch.equal(tokens[: 1 + ROOM], empty[: 1 + ROOM])
    assert torch.equal(tokens[WINDOW : WINDOW + 21], empty[:21])


def test_more_weight_is_further_from_none(text):
    """The distance from the empty prompt's states grows with the weight."""
    empty, _ = plain(text, "")
    distances = [(weighted(text, f"(a b c:{w})")[0][1:4] - empty[1:4]).norm() for w in (0, 0.4, 0.9, 1, 1.1, 2, 5)]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[1]


def test_states_keep_the_encoders_dtype(folder):
    """The weights are applied in float32 and rounded once."""
    encoders, tokenizers = load_parts(folder)
    half = TextEncoders(tuple(encoder.to(torch.bfloat16) for encoder in encoders), tokenizers)

    tokens, pooled = weighted(half, "a (b:1.3)")

    base, empty = plain(half, "a b")[0].float(), plain(half, "")[0].float()
    expected = empty[2] + torch.tensor(1.3) * (base[2] - empty[2])
    assert tokens.dtype == pooled.dtype == torch.bfloat16
    assert torch.equal(tokens[2], expected.to(torch.bfloat16))


def test_break_gives_each_part_its_own_window(text):
    """Two parts are two windows, each as if alone, and the first gives the pooled state."""
    tokens, pooled = weighted(text, "a red fox BREAK on (a:1.4) hill")

    first, second = weighted(text, "a red fox"), weighted(text, "on (a:1.4) hill")
    assert_close((tokens, pooled), (torch.cat([first[0], second[0]]), first[1]))
    assert len(plain(text, "a BREAK b")[0]) == WINDOW, "in plain prompts it is a word"


def test_tokenizers_that_differ_still_give_as_many_windows(folder, tmp_path):
    """The encoder that needs fewer windows of a part reads empty ones, and parts stay abreast."""
    wordy, terse = load_parts(save_random_sdxl(tmp_path / "m")), load_parts(BUILTIN_FOLDER)
    mixed = TextEncoders((wordy[0][0], terse[0][1]), (wordy[1][0], terse[1][1]))
    alone = TextEncoders(terse[0][1:], terse[1][1:])
    part = "background " * 10  # 10 letters or 1 token each

    tokens, _ = weighted(mixed, f"{part} BREAK a cat")

    terse_states = tokens[:, mixed.widths[0] :]
    expected = [plain(alone, prompt)[0] for prompt in (part, "", "a cat")]
    assert len(tokens) == 3 * WINDOW
    assert_close((terse_states, terse_states), (torch.cat(expected), torch.cat(expected)))


@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize("prompt", ["{}", "a {} cat", "a {}, {}", words(60) + " {} fox"])
def test_an_embedding_equals_diffusers(folder, text, learned, vectors, prompt):
    """A learned word, of one vector or several, gives the states of ``load_textual_inversion``."""
    file, tensors = learned("<new>", vectors)
    pipeline = load_pipeline(folder)
    for key, part in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(pipeline, f"text_encoder{part}"), getattr(pipeline, f"tokenizer{part}")
        pipeline.load_textual_inversion(tensors[key], token="<new>", text_encoder=encoder, tokenizer=tokenizer)

    for ours in (plain, weighted):
        assert_close(ours(text, prompt.format("<new>", "<new>"), file), theirs(pipeline, prompt.format(*["<new>"] * 2)))


def test_an_embedding_changes_what_its_word_says(text, learned):
    """With the file the word means something else, also as ``embedding:word``; without, it is a word."""
    file, _ = learned("fox", 1)

    assert not torch.equal(plain(text, "a fox", file)[0], plain(text, "a fox")[0])
    assert_equal(plain(text, "a embedding:fox", file), plain(text, "a fox", file))
    assert_equal(plain(text, "a foxes Fox", file), plain(text, "a foxes Fox"))
    assert_equal(plain(text, "a fox"), plain(text, "a fox"))


def test_several_embeddings_keep_to_their_places(text, learned):
    """Two words, each with its own vectors: the order counts."""
    one, _ = learned("one", 2, seed=1)
    two, _ = learned("two", 3, seed=2)

    tokens, _ = plain(text, "one two", one, two)

    assert not torch.equal(tokens, plain(text, "two one", one, two)[0])
    assert_equal(plain(text, "one two", one, two), plain(text, "one two", two, one))
    # The states of a position read only what stands before it.
    assert torch.equal(tokens[:3], plain(text, "one", one)[0][:3])


def test_an_embedding_can_be_weighted(text, learned):
    """All its positions move together."""
    file, _ = learned("foo", 3)
    base, empty = plain(text, "a foo b", file)[0], plain(text, "")[0]

    tokens, _ = weighted(text, "a (foo:1.5) b", file)

    expected = empty[2:5] + 1.5 * (base[2:5] - empty[2:5])
    assert_close((tokens[2:5], tokens[5:]), (expected, base[5:]))


@pytest.mark.parametrize("before", [ROOM - 3, ROOM - 1, ROOM])
def test_an_embedding_is_never_cut_in_two(text, learned, before):
    """What does not fit into the rest of a window begins the next one."""
    file, _ = learned("foo", 4)

    tokens, pooled = plain(text, f"{words(before)} foo b", file)

    first, second = plain(text, words(before)), plain(text, "foo b", file)
    assert_close((tokens, pooled), (torch.cat([first[0], second[0]]), first[1]))


def test_an_embedding_may_fill_a_window(text, learned):
    """75 vectors are one window, and end exactly where it ends."""
    file, _ = learned("foo", ROOM)
    assert len(plain(text, "foo", file)[0]) == WINDOW
    assert len(plain(text, "foo a", file)[0]) == 2 * WINDOW


def test_vectors_never_pass_for_the_end(folder, text, learned):
    """The pooled state is the end token's, also where an old configuration seeks it as the highest id."""
    file, _ = learned("foo", 5)
    encoders, tokenizers = load_parts(folder)
    encoders[1].text_model.eos_token_id = 2
    old = TextEncoders(encoders, tokenizers)

    assert_equal(plain(old, "a foo b", file), plain(text, "a foo b", file))
    assert not torch.equal(plain(old, "a foo b", file)[1], plain(old, "a foo", file)[1])


def test_the_network_is_left_as_it_was(text, parts, learned):
    """No hook stays behind, nor after an error."""
    layer = parts[0][0].get_input_embeddings()
    file, _ = learned("foo", 2)
    before = plain(text, "a foo")
    plain(text, "a foo", file)
    assert not layer._forward_hooks

    def fail():
        with substituted(layer, [[Unit(0, 1.0, torch.zeros(1, text.widths[0]))]]):
            assert layer._forward_hooks, "else this proves nothing"
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert not layer._forward_hooks
    assert_equal(plain(text, "a foo"), before)


def test_an_embedding_for_other_encoders_is_an_error_even_unused(text, tmp_path):
    """A file that does not fit is said so, whether the prompt has its word or not."""
    save_file({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, tmp_path / "a.safetensors")
    files = resolve_embeddings([EmbeddingRef("foo", str(tmp_path / "a.safetensors"))])

    with pytest.raises(InvalidInput, match=r"embeddings\.0\.path is not for this model"):
        plain(text, "a cat", *files)


def test_a_prompt_beyond_all_windows_is_an_error_that_counts(text):
    """Nothing is cut in silence: the message counts tokens, or windows where those are the trouble."""
    limit = MAX_WINDOWS * ROOM
    assert len(plain(text, words(limit))[0]) == MAX_WINDOWS * WINDOW
    assert len(weighted(text, " BREAK ".join("a" * MAX_WINDOWS))[0]) == MAX_WINDOWS * WINDOW
    with pytest.raises(InvalidInput, match=f"prompt has {limit + 10} tokens; at most {limit}"):
        plain(text, words(limit + 10))
    with pytest.raises(InvalidInput, match="prompt fills 21 windows of 75 tokens; at most 20"):
        weighted(text, " BREAK ".join("a" * (MAX_WINDOWS + 1)))


def test_prompts_are_keys():
    """Equal prompts are one entry of a cache; another syntax is another prompt."""
    assert len({Prompt("a"), Prompt("a"), Prompt("a", "weighted"), Prompt("b")}) == 3
