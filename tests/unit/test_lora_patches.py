"""Patches: exact at strength 0, of the weight's shape and float32, and honest about what they fit."""

import pytest
import torch

from impasto.lora.patch import LowRank, Patch
from impasto.lora.patches.decomposed import Decomposed
from impasto.lora.patches.full import Difference, Replacement
from impasto.lora.patches.generalized import Generalized
from impasto.lora.patches.input_butterfly import InputButterfly, half_cayley
from impasto.lora.patches.joined import Joined
from impasto.lora.patches.products import Hadamard, Half, Kronecker
from impasto.lora.patches.rotations import (
    Butterfly,
    InputRotated,
    OutputRotated,
    block_size,
    cayley,
    cayley_of_upper,
)
from impasto.lora.patches.scaled import Scaled, ScaledBias
from impasto.lora.patches.variants import Vera, adalora

SHAPE = torch.Size((8, 12))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank() -> LowRank:
    return LowRank(numbers(2, 12), numbers(8, 2, seed=1), 0.5)


PATCHES: dict[str, Patch] = {
    "low rank": low_rank(),
    "hadamard": Hadamard(Half(numbers(8, 2), numbers(2, 12)), Half(numbers(8, 2, seed=1), numbers(2, 12, seed=1)), 0.5),
    "kronecker": Kronecker(numbers(2, 3), numbers(4, 4), 0.5),
    "decomposed": Decomposed(low_rank(), numbers(8).abs(), 0),
    "decomposed, inputs": Decomposed(low_rank(), numbers(12).abs(), 1),
    "generalized": Generalized(numbers(12, 2), numbers(2, 12), numbers(8, 2), numbers(2, 12), 0.5),
    "output rotated": OutputRotated(cayley(numbers(2, 4, 4)), numbers(8)),
    "butterfly": Butterfly(cayley(numbers(2, 2, 4, 4)), numbers(8)),
    "input rotated": InputRotated(cayley_of_upper(numbers(3, 6), 5)),
    "vera": Vera(numbers(2, 15)[:, :12], numbers(9, 2)[:8], numbers(2), numbers(8)),
    "adalora": adalora(numbers(2, 12), numbers(8, 2, seed=1), numbers(2, 1), 0.5),
    "input butterfly": InputButterfly(half_cayley(numbers(2, 6, 2, 2)), numbers(8)),
    "scaled": Scaled(numbers(8), on_input=False),
    "scaled, inputs": Scaled(numbers(12), on_input=True),
    "difference": Difference(numbers(8, 12)),
    "replacement": Replacement(numbers(8, 12)),
    "joined": Joined((low_rank(), Difference(numbers(8, 12)))),
}


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strength_zero_is_the_weight_bit_for_bit(name, dtype):
    """And any other strength is not, in float32 and the weight's shape; the weight itself is left alone."""
    weight = numbers(*SHAPE, seed=7).to(dtype)
    before = weight.clone()
    assert torch.equal(PATCHES[name].patched(weight, 0.0), weight.float())
    for strength in (-1.0, 0.5, 1.0, 4.0):
        patched = PATCHES[name].patched(weight, strength)
        assert patched.dtype == torch.float32
        assert patched.shape == weight.shape
        assert not torch.equal(patched, weight.float())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", PATCHES)
def test_additive_means_linear_and_blind_to_the_weight(name):
    """What calls itself additive adds the same to any weight, in proportion to the strength; the others do not."""
    patch = PATCHES[name]
    one, two = numbers(*SHAPE, seed=7), numbers(*SHAPE, seed=8)
    added = patch.patched(one, 1.0) - one
    same = torch.allclose(patch.patched(two, 2.0) - two, 2 * added, atol=1e-5)
    assert same == (patch.additive or name == "joined")


@pytest.mark.parametrize("name", PATCHES)
def test_fits_knows_its_shape(name):
    """It fits its own weight, and no weight of another length on the axes that it knows."""
    patch = PATCHES[name]
    assert patch.fits(SHAPE)
    for other in ((9, 13), (8,), (16, 25), (7, 11)):
        assert not patch.fits(torch.Size(other))
    knows_one_axis = name.startswith(("scaled", "output", "butterfly"))
    assert patch.fits(torch.Size((8, 12, 3, 3))) == knows_one_axis
    assert patch.shape


@pytest.mark.parametrize("name", PATCHES)
def test_factors_are_the_low_rank_sum(name):
    """Low-rank kinds give the two matrices whose product is added; the others say that they have none."""
    patch = PATCHES[name]
    factors = patch.factors()
    if name not in ("low rank", "vera", "adalora"):
        assert factors is None
        return
    left, right = factors
    weight = numbers(*SHAPE, seed=7)
    torch.testing.assert_close(weight + left @ right, patch.patched(weight, 1.0))


def test_a_row_without_length_has_no_direction():
    """DoRA of a row of zeros stays zeros instead of becoming no number."""
    patch = Decomposed(Difference(torch.zeros(2, 3)), torch.ones(2), 0)
    weight = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    torch.testing.assert_close(patch.patched(weight, 1.0), torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]))


def test_half_of_a_dora_is_half_the_way():
    """Partial strengths interpolate the weight, they do not scale the delta inside the norm."""
    weight = numbers(*SHAPE, seed=7)
    whole = PATCHES["decomposed"].patched(weight, 1.0)
    torch.testing.assert_close(PATCHES["decomposed"].patched(weight, 0.5), (weight + whole) / 2)


def test_rotations_keep_lengths():
    """diag-OFT and BOFT without a rescale turn columns and change no column's length."""
    weight = numbers(*SHAPE, seed=7)
    for patch in (OutputRotated(cayley(numbers(2, 4, 4))), Butterfly(cayley(numbers(2, 2, 4, 4)))):
        torch.testing.assert_close(patch.patched(weight, 1.0).norm(dim=0), weight.norm(dim=0))


def test_a_small_rotation_keeps_its_digits():
    """R - I of a turn by a millionth is right to float32, not to what is left after taking 1 from R."""
    blocks = torch.tensor([[[0.0, 1e-6], [0.0, 0.0]]])
    torch.testing.assert_close(cayley(blocks)[0, 0, 1].item(), 2e-6, rtol=1e-6, atol=0)


def test_the_constraint_binds_only_what_is_over_it():
    """Below the constraint nothing changes; above it the norm of all blocks together is cut to it."""
    blocks = numbers(2, 4, 4)
    norm = (blocks - blocks.mT).norm().item()
    assert torch.equal(cayley(blocks, norm * 1.1), cayley(blocks))
    torch.testing.assert_close(cayley(blocks, norm / 2), cayley(blocks / 2), rtol=1e-5, atol=1e-6)


def test_a_butterfly_of_the_inputs_keeps_the_lengths_of_rows():
    """Without a scale PEFT's BOFT turns the rows, in any number of stages; groups that do not divide do not fit."""
    weight = numbers(*SHAPE, seed=7)
    for stages, size in ((1, 4), (1, 3), (2, 2), (1, 12)):
        turned = InputButterfly(half_cayley(numbers(stages, 12 // size, size, size))).patched(weight, 1.0)
        torch.testing.assert_close(turned.norm(dim=1), weight.norm(dim=1))
    assert not InputButterfly(torch.zeros(2, 3, 4, 4)).fits(SHAPE)
    assert not InputButterfly(torch.zeros(2, 4, 3, 3)).fits(SHAPE)
    assert not InputButterfly(torch.zeros(60, 6, 2, 2)).fits(SHAPE)
    assert not InputButterfly(torch.zeros(1, 3, 4, 4), torch.ones(7)).fits(SHAPE)


def test_a_scaled_bias_is_the_answer_s_part():
    """A number for each output, and nothing but a bias of that length."""
    patch = ScaledBias(torch.tensor([1.0, -0.5]), on_input=False)
    assert torch.equal(patch.patched(torch.tensor([2.0, 4.0]), 1.0), torch.tensor([4.0, 2.0]))
    assert torch.equal(patch.patched(torch.tensor([2.0, 4.0]), 0.0), torch.tensor([2.0, 4.0]))
    assert patch.fits(torch.Size((2,)))
    assert not patch.fits(torch.Size((3,)))
    assert not patch.fits(torch.Size((2, 2)))


def test_butterflies_that_cannot_be_laid_out_do_not_fit():
    """Stages that reach past the outputs, odd blocks, and a rescale of another length are no match."""
    assert Butterfly(torch.zeros(2, 2, 4, 4)).fits(SHAPE)
    assert not Butterfly(torch.zeros(3, 2, 4, 4)).fits(SHAPE)
    assert not Butterfly(torch.zeros(60, 2, 4, 4)).fits(SHAPE)
    assert not Butterfly(torch.zeros(1, 3, 3, 3)).fits(torch.Size((9, 12)))
    assert not Butterfly(torch.zeros(2, 2, 4, 4), torch.ones(7)).fits(SHAPE)


@pytest.mark.parametrize(("above", "size"), [(1, 2), (6, 4), (496, 32), (0, 0), (4, 0), (7, 0)])
def test_block_sizes_from_triangles(above, size):
    """6 numbers are above the diagonal of a square of 4; 4 are above no square's."""
    assert block_size(above) == size


def test_neumann_series_as_peft_counts_its_terms():
    """1 is nothing, 2 is 2Q, 3 and 4 are 2Q + 2Q² + Q³, 5 adds the fourth power once."""
    upper = numbers(1, 1) / 10
    q = torch.zeros(2, 2)
    q[0, 1], q[1, 0] = upper[0, 0], -upper[0, 0]
    wanted = {
        1: q * 0,
        2: 2 * q,
        3: 2 * q + 2 * q @ q + q @ q @ q,
        4: 2 * q + 2 * q @ q + q @ q @ q,
        5: 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q,
    }
    for terms, turn in wanted.items():
        torch.testing.assert_close(cayley_of_upper(upper, terms)[0], turn, rtol=1e-5, atol=1e-7)
