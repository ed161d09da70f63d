"""Every kind in every spelling: the weights are the closed formulas', and the report is the generator's own list.

This is a part of the matrix that fits in a minute; ``python -m tests.parity.lora.table`` runs all of it.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file

from impasto.errors import LoraError
from impasto.lora.keys import Target
from tests.parity.lora.adapters import ALPHAS, DTYPES, KINDS
from tests.parity.lora.check import RELATIVE, Checker
from tests.parity.lora.files import LoraCase, write_case, write_mixture
from tests.parity.lora.networks import LAYERS, networks, with_refiner
from tests.parity.lora.spellings import SPELLINGS

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 4.0)


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    """A small SDXL with the real names."""
    checker = Checker(networks())
    yield checker
    checker.forget()


def reported(checker: Checker, case: LoraCase) -> None:
    """The report's lists are the generator's."""
    contents = checker.contents(case)
    assert {target: patch.kind for target, patch in contents.patches.items()} == case.kinds, case.name
    assert set(contents.unmatched) == case.unmatched, case.name
    assert {mismatch.module for mismatch in contents.mismatched} == case.mismatched, case.name
    assert set(contents.ignored) == case.ignored, case.name
    assert {bundle.word for bundle in contents.bundles if not bundle.problem} == case.words, case.name
    assert contents.base_model in ("SDXL", "unknown"), case.name  # unknown where the strays are most of the file


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_spelling_is_its_formula(checker, tmp_path, kind):
    """Every spelling of every kind, alphas, dtypes and strengths taking turns: every parameter is right to 1e-5."""
    alphas, dtypes, strengths = (itertools.cycle(items) for items in (ALPHAS, DTYPES, (1.0, 0.5, 4.0, -1.0)))
    seen = 0
    for seed, spelling in enumerate(SPELLINGS):
        case = write_case(
            checker.networks, tmp_path / f"{seed}.safetensors", kind, spelling, next(alphas), next(dtypes), seed
        )
        if case is None:
            continue
        seen += 1
        reported(checker, case)
        assert checker.error([case], [next(strengths)]) <= RELATIVE, case.name
        assert checker.error([case], [0.0], others=False) == 0, case.name
    assert seen >= 8  # spellings that can write the kind
    checker.forget()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("alpha", ALPHAS, ids=lambda alpha: alpha.name)
def test_every_alpha_at_every_strength(checker, tmp_path, alpha, strength):
    """An alpha of any shape and dtype, of none, of zero and below zero scales as the trainer's rule says."""
    for seed, kind in enumerate(("LoRA", "LoKr, second factored")):
        case = write_case(checker.networks, tmp_path / f"{seed}.safetensors", kind, "kohya, original names", alpha)
        assert case is not None
        assert checker.error([case], [strength], others=False) <= RELATIVE, case.name


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stacks_of_mixtures(checker, tmp_path, count):
    """Files of all kinds, spellings, alphas and dtypes in one, stacked: one after another in the request's order."""
    cases = [
        write_mixture(checker.networks, tmp_path / f"{seed}.safetensors", 10 * count + seed) for seed in range(count)
    ]
    for case in cases:
        reported(checker, case)
    strengths = (1.0, -1.0, 0.5, 1.0, 0.5)[:count]
    assert checker.error(cases, strengths) <= RELATIVE
    assert len(set().union(*(case.layers for case in cases))) >= (4 if count == 1 else len(LAYERS))


def test_a_wrong_formula_is_seen(checker, tmp_path):
    """The comparison can fail: another strength than the file was put on with is far beyond the tolerance."""
    case = write_case(checker.networks, tmp_path / "a.safetensors", "LoRA", "lycoris_", ALPHAS[0])
    assert case is not None
    right = dict(case.wanted)
    for target, formula in right.items():
        case.wanted[target] = lambda weight, strength, formula=formula: formula(weight, strength * 1.001)
    assert checker.error([case], [1.0]) > 10 * RELATIVE
    case.wanted = dict(list(right.items())[1:])
    assert checker.error([case], [1.0]) == float("inf")  # one parameter changed that should not have


@pytest.mark.parametrize("spelling", ["kohya, original names", "kohya, diffusers names", "diffusion_model."])
def test_a_refiners_lora_lands_on_the_refiner(tmp_path, spelling):
    """The refiner's block layout is its own, four levels deep; what fits it alone changes it alone."""
    both = with_refiner()
    refined = [
        target
        for layer in ("linear", "1x1", "3x3")
        for target in both.layers[layer]
        if target.network == "refiner" and both.shape(target) != _shape_in_base(both, target)
    ]
    tensors, wanted = {}, set()
    for target in refined:
        name = SPELLINGS[spelling].module(both, target)
        out, inputs, *window = both.shape(target)
        tensors[f"{name}.lora_down.weight"] = torch.ones(1, inputs, *window)
        tensors[f"{name}.lora_up.weight"] = torch.ones(out, 1, *(1 for _ in window))
        wanted.add(target)
    save_file(tensors, tmp_path / "refiner.safetensors")
    checker = Checker(both)
    contents = checker.contents(LoraCase("refiner", tmp_path / "refiner.safetensors"))
    assert set(contents.patches) == wanted
    assert not contents.unmatched
    assert not contents.mismatched
    assert contents.base_model == "SDXL refiner"
    assert len(refined) > 100


def _shape_in_base(both, target: Target):
    base = Target("unet", target.module)
    named = {name for name, _ in both.modules["unet"].named_modules()}
    return both.shape(base) if target.module in named else None


def test_a_file_for_neither_is_refused(tmp_path):
    """The same names at another width fit nothing: an error, never a success."""
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 768), f"{name}.lora_up.weight": torch.ones(320, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match=r"SD 1\.5"):
        Checker(networks()).contents(LoraCase("a", tmp_path / "a.safetensors"))
