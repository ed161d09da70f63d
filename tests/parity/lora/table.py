"""Write docs/lora-conformance.md: the whole matrix of generated LoRA files, and how far we are from the formulas.

``python -m tests.parity.lora.table`` takes a few minutes on one core.
"""

import argparse
import itertools
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from tests.parity.lora.adapters import ALPHAS, DTYPES, KINDS, Alpha
from tests.parity.lora.check import RELATIVE, ROOM, Checker
from tests.parity.lora.files import LoraCase, write_case, write_mixture
from tests.parity.lora.networks import networks
from tests.parity.lora.spellings import SPELLINGS
from tests.parity.lora.test_references import LAYERS, LYCORIS, LYCORIS_AT_ONE, PEFT_KINDS, STRENGTHS

PAGE = Path("docs/lora-conformance.md")
STACKS = {1: 40, 2: 40, 5: 40}  # files in a stack -> stacks
EVERY_SPELLING = ("rank", "absent", "one")  # alphas that every spelling of every kind is written with


@dataclass
class Result:
    """What was run and seen."""

    files: int = 0
    changes: int = 0
    wrong_reports: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    at_zero: float = 0.0
    worst: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, groups: list[tuple[str, str]], error: float, name: str) -> None:
        """Note the error of one comparison under each of its groups."""
        for group in groups:
            self.worst[group] = max(self.worst[group], error)
            self.counts[group] += 1
        if error > RELATIVE:
            self.over.append(name)


def single_files() -> Iterator[tuple[str, str, Alpha, str]]:
    """Every kind in every spelling, and every kind with every alpha in every dtype, spellings taking turns."""
    alphas = [alpha for alpha in ALPHAS if alpha.name in EVERY_SPELLING]
    for kind, spelling, alpha in itertools.product(KINDS, SPELLINGS, alphas):
        yield kind, spelling, alpha, "float32"
    turns = itertools.cycle(SPELLINGS)
    for kind, alpha, dtype in itertools.product(KINDS, ALPHAS, DTYPES):
        yield kind, next(turns), alpha, dtype


def run(checker: Checker, folder: Path, every: int) -> Result:
    """Run the matrix, or one file in ``every``."""
    result = Result()
    path = folder / "case.safetensors"
    for seed, (kind, spelling, alpha, dtype) in enumerate(single_files()):
        if seed % every:
            continue
        case = write_case(checker.networks, path, kind, spelling, alpha, dtype, seed)
        if case is None:
            continue
        report(checker, case, result)
        for strength in STRENGTHS:
            error = checker.error([case], [strength], others=strength == 1)
            groups = [("kind", kind), ("spelling", spelling), ("alpha", alpha.name), ("dtype", dtype)]
            groups += [("strength", f"{strength:g}"), *(("layer", layer) for layer in sorted(case.layers))]
            result.add(groups, error, f"{case.name} at {strength}")
        forget(checker, path)
    for count, times in STACKS.items():
        for turn in range(0, times, every):
            stack(checker, folder, count, turn, result)
    return result


def report(checker: Checker, case: LoraCase, result: Result) -> None:
    """Compare the report's lists with the generator's."""
    contents = checker.contents(case)
    result.files += 1
    result.changes += len(case.wanted)
    lists = (
        {target: patch.kind for target, patch in contents.patches.items()} == case.kinds,
        set(contents.unmatched) == case.unmatched,
        {mismatch.module for mismatch in contents.mismatched} == case.mismatched,
        set(contents.ignored) == case.ignored,
        {bundle.word for bundle in contents.bundles if not bundle.problem} == case.words,
    )
    if not all(lists):
        result.wrong_reports.append(case.name)


def stack(checker: Checker, folder: Path, count: int, turn: int, result: Result) -> None:
    """Put files of mixtures on together, at strengths taking turns."""
    cases = [
        write_mixture(checker.networks, folder / f"{i}.safetensors", 1000 * count + 10 * turn + i) for i in range(count)
    ]
    for case in cases:
        report(checker, case, result)
    strengths = [(1.0, 0.5, -1.0, 1.0, 0.5)[(i + turn) % 5] for i in range(count)]
    result.add([("stack", str(count))], checker.error(cases, strengths), f"stack of {count}, {turn}")
    for case in cases:
        forget(checker, case.path)


def forget(checker: Checker, path: Path) -> None:
    """Make room for the next file of that name."""
    checker.forget()
    path.unlink()


def table(result: Result, group: str, title: str) -> list[str]:
    """Return a Markdown table of one group."""
    lines = [f"| {title} | comparisons | worst error |", "|---|---:|---:|"]
    names = [name for kind, name in result.worst if kind == group]
    lines += [f"| {name} | {result.counts[group, name]} | {result.worst[group, name]:.0e} |" for name in names]
    return [*lines, ""]


def page(result: Result) -> str:
    """Return the page."""
    fully = len(LYCORIS) * len(LAYERS) * len(STRENGTHS) + len(LYCORIS_AT_ONE) * len(LAYERS)
    wrong = len(result.wrong_reports)
    lines = [
        "# LoRA conformance",
        "",
        "Made by `python -m tests.parity.lora.table`. A seeded generator writes LoRA files of every kind in every",
        "spelling for a small SDXL with the real module names, with strays among them, and says what a right reader",
        "must make of each. The files go through the same door as a user's; the weights are compared with closed",
        "formulas in float64 that share no code with the library.",
        "",
        f"- **{result.files} files**, {result.changes} changed parameters,"
        f" {sum(result.counts['kind', k] for k in KINDS)}",
        f"  comparisons at strengths {', '.join(f'{s:g}' for s in STRENGTHS)} and"
        f" {sum(result.counts['stack', str(n)] for n in STACKS)} stacks of {', '.join(map(str, STACKS))}.",
        f"- Allowed: an error of {RELATIVE:.0e} of a parameter's change; where that is so small beside its weight that",
        f"  float32 cannot hold it so well, {ROOM} roundings of the weight. **Over it: {len(result.over)}.**",
        f"- Reports that differ from the generator's list: **{wrong}** of {result.files}.",
        "- Parameters that a file does not name stay the model's own, bit for bit; strength 0 changes nothing.",
        "",
        *table(result, "kind", "kind"),
        *table(result, "spelling", "spelling"),
        *table(result, "alpha", "alpha"),
        *table(result, "dtype", "dtype of the file"),
        *table(result, "layer", "layer type"),
        *table(result, "strength", "strength"),
        *table(result, "stack", "files in the stack"),
        "## The trainers' own code",
        "",
        f"`tests/parity/lora/test_references.py` compares with LyCORIS {version('lycoris-lora')} (its live forward,",
        f"{fully} comparisons), PEFT {version('peft')} (its saved folder with its merged weights,",
        f"{len(PEFT_KINDS) * len(LAYERS)} comparisons) and diffusers {version('diffusers')} (its loader; its files",
        "with the configuration in the metadata), to the same 1e-5. They are asked only where they are right:",
        "",
        "| not followed | why |",
        "|---|---|",
        "| LyCORIS' `merge_to` of LoHa and LoKr | scales by alpha / rank twice; its forward pass does not |",
        "| LyCORIS' DoRA beside strength 1 | strength 0 would not be the model's own weight |",
        "| LyCORIS' rescale of OFT beside strength 1 | the same |",
        "| LyCORIS' alpha 0 | it reads it as the rank; here 0 is 0, as in every other reader |",
        "| diffusers with several alphas in one kohya file | gives all attention modules the most common one |",
        "| diffusers for DoRA in kohya's spelling | drops the magnitude |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the matrix and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="run one file in so many, and write no page")
    every = parser.parse_args().every
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = run(Checker(networks()), Path(folder), every)
    text = page(result)
    if every == 1:
        PAGE.write_text(text, encoding="utf-8")
    print(text)
    for name in (*result.over, *result.wrong_reports):
        print("wrong:", name)


if __name__ == "__main__":
    main()
