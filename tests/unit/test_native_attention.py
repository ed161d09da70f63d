"""The kernel for attention: exact but for rounding, row by row, and left out where it cannot be had."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impasto.models import blocked, native

HALF_ROUNDING = 5e-3  # relative, of bfloat16's 8 bits
needs_kernel = pytest.mark.skipif(
    not native.can_multiply() or native.kernel() is None,
    reason="needs AVX-512 for bfloat16 and a C++ compiler; the fallback is tested below",
)


def projected(rows: int, heads: int, length: int, keys: int, width: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries, and keys and values that lie side by side as a fused projection leaves them."""
    dice = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, length, heads * width, generator=dice).bfloat16()
    both = torch.randn(rows, keys, 2 * heads * width, generator=dice).bfloat16().chunk(2, -1)
    return tuple(part.unflatten(-1, (heads, width)).transpose(1, 2) for part in (query, *both))


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.double(), key.double(), value.double())


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given.double() - wanted).norm() / wanted.norm())


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 300), st.sampled_from(native.WIDTHS),
    st.floats(0.01, 30),
)  # fmt: skip
def test_it_is_attention(rows: int, heads: int, length: int, keys: int, width: int, loud: float) -> None:
    """For any numbers of queries and keys, sharp and flat, within the rounding of what is read and written."""
    query, key, value = projected(rows, heads, length, keys, width)
    query = query * loud
    made = native.attend(query, key, value)
    assert made.shape == query.shape and made.dtype == torch.bfloat16
    assert relative(made, exact(query, key, value)) <= HALF_ROUNDING


@needs_kernel
def test_it_is_no_farther_from_exact_than_plain_products() -> None:
    """Scores are not rounded on the way."""
    given = projected(1, 2, 256, 1024, 32)
    wanted = exact(*given)
    assert relative(native.attend(*given), wanted) < 0.75 * relative(blocked.attend(*given), wanted)


@needs_kernel
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_several_threads() -> None:
    """Enough scores for threads of their own, which divide rows and heads."""
    query, key, value = projected(3, 3, 700, 700, 32)
    assert query[..., 0].numel() * 700 > 4 << 20
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = native.attend(query, key, value)
    finally:
        torch.set_num_threads(threads)
    for row in range(3):
        assert torch.equal(
            native.attend(query[row : row + 1], key[row : row + 1], value[row : row + 1])[0], together[row]
        )


@needs_kernel
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_so_and_in_its_row(wrong: float) -> None:
    """An overflow must be seen by whoever looks at the picture, and not spread to other queries."""
    query, key, value = projected(1, 1, 40, 50, 32)
    query[0, 0, 7, 3] = wrong
    made = native.attend(query, key, value)
    assert made[0, 0, 7].isnan().all()
    assert made[0, 0, torch.arange(40) != 7].isfinite().all()


@needs_kernel
def test_great_scores_do_not_overflow() -> None:
    """The greatest is taken off first: each query finds its own key."""
    key = torch.eye(32)[None, None].bfloat16()
    value = torch.randn(1, 1, 32, 32).bfloat16()
    assert torch.equal(native.attend(key * 1e6, key, value), value)


@needs_kernel
def test_a_compiled_network_gets_it_where_blocks_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one operator, with the bits of the kernel; where they are few, plain products are written out."""
    given = projected(2, 2, 60, 70, 32)
    assert torch.equal(native.attend_compiled(*given), blocked.written(*given))
    monkeypatch.setattr(blocked, "MOST_WRITTEN", 0)
    assert torch.equal(native.attend_compiled(*given), native.attend(*given))
    torch.library.opcheck(native._operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("width", [16, 40, 32])
def test_whatever_is_not_for_the_kernel_goes_the_other_way(width: int) -> None:
    """Other widths of heads, and single precision."""
    given = projected(1, 2, 9, 11, width)
    full = tuple(tensor.float() for tensor in given)
    assert torch.equal(native.attend(*full), F.scaled_dot_product_attention(*full))
    assert relative(native.attend(*given), exact(*given)) <= HALF_ROUNDING
    assert native.suits(*given) == (width in native.WIDTHS) and not native.suits(*full)


@pytest.fixture
def fresh() -> Iterator[None]:
    """A process that has not asked for the kernel."""
    native.kernel.cache_clear()
    yield
    native.kernel.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("compiler", "why"), [("", "install g++ or clang"), ("/nowhere/c++", "No such file"), ("false", "exit status 1")]
)
def test_without_a_compiler_the_log_says_so_and_plain_products_serve(
    compiler: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None at all, one that is not there, one that fails."""
    monkeypatch.setattr(native, "can_multiply", lambda: True)
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    given = projected(1, 2, 9, 11, 32)
    with caplog.at_level(logging.WARNING):
        made = native.attend(*given)
    assert "native_attention is off" in caplog.text and why in caplog.text
    assert torch.equal(made, blocked.attend(*given))


@needs_kernel
@pytest.mark.skipif(native.teams() is None, reason="which OpenMP library is torch's cannot be told here")
@pytest.mark.parametrize("length", [200, 700])
def test_torchs_own_threads_give_the_same_bits_as_threads_of_the_kernels_own(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Also where there are fewer heads than threads."""
    given = projected(2, 3, length, 700, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        theirs = native.attend(*given)
        monkeypatch.setattr(native, "teams", lambda: None)
        assert torch.equal(native.attend(*given), theirs)
    finally:
        torch.set_num_threads(threads)
