"""Write docs/comfyui-lora.md: LoRA files of every kind inside ComfyUI, by its own loader and by our node, measured.

``IMPASTO_COMFYUI=PATH python -m tests.comfyui.exact_table``, in an environment with ComfyUI's requirements. Takes some
minutes on one core; ``--every 10`` runs a tenth and writes nothing. It fails where the node is off by more than 1e-5.

Both ways end in the weights that ComfyUI would draw with: its patcher has put them on. They are compared with the
conformance suite's float64 formulas.
"""

import argparse
import itertools
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from impasto.errors import ImpastoError
from impasto.lora.keys import Target
from tests.comfyui.inside import enter_comfyui
from tests.comfyui.models import Loaded, load_small
from tests.parity.lora.adapters import ALPHAS, KINDS, Alpha
from tests.parity.lora.check import FLOAT32, RELATIVE, ROOM
from tests.parity.lora.files import LoraCase, write_case, write_mixture
from tests.parity.lora.spellings import SPELLINGS

PAGE = Path("docs/comfyui-lora.md")
STRENGTHS = (1.0, 0.6)
ALPHAS_USED = ("one", "absent")  # another number than the rank, and none
KOHYA = "kohya, original names"  # which ComfyUI knows for every module
STACKS = (2, 5)
TURNS = 10  # stacks of each length
Weights = dict[Target, torch.Tensor]
Outcome = str  # of a parameter: right, untouched, wrong; or refused


@dataclass
class Tally:
    """What one way of loading made of the parameters of a group of files."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    worst: float = 0.0  # error of a parameter's change, relative to the change

    def add(self, outcome: Outcome, error: float) -> None:
        self.counts[outcome] += 1
        self.worst = max(self.worst, error)

    def text(self) -> str:
        """Such as ``12 of 20 right, 8 untouched``."""
        total = self.counts.total()
        if not total:
            return "-"
        if self.counts["right"] == total:
            return "all right"
        parts = [f"{self.counts[word]} {word}" for word in ("untouched", "wrong") if self.counts[word]]
        return ", ".join([f"{self.counts['right']} of {total} right", *parts])


@dataclass
class Result:
    """Tallies of both by group, and what went wrong with ours."""

    comfyui: dict[tuple[str, str], Tally] = field(default_factory=dict)
    ours: dict[tuple[str, str], Tally] = field(default_factory=dict)
    files: int = 0
    failures: list[str] = field(default_factory=list)
    raised: Counter[str] = field(default_factory=Counter)  # ComfyUI's exceptions

    def add(self, side: dict[tuple[str, str], Tally], groups: list[tuple[str, str]], out: Outcome, err: float) -> None:
        for group in groups:
            side.setdefault(group, Tally()).add(out, err)


class Inside:
    """The small model inside ComfyUI: puts LoRAs on in either way and reads the weights off."""

    def __init__(self, loaded: Loaded) -> None:
        from impasto.comfyui.exact import names_of

        self.loaded = loaded
        theirs = names_of(loaded.model, loaded.clip).keys
        # The suite's text encoders have transformers' names, in which the first lost ``text_model``.
        self.keys = {_plain(target): place for target, place in theirs.items()}
        self.own = self.read(loaded.model, loaded.clip)

    def read(self, model: Any, clip: Any) -> Weights:
        """Have ComfyUI put on what is patched, read all weights, and have it taken off."""
        patchers = {"model": model, "clip": clip.patcher}
        try:
            states = {half: patcher.patch_model().state_dict() for half, patcher in patchers.items()}
            return {target: states[half][key].detach().clone() for target, (half, key) in self.keys.items()}
        finally:
            for patcher in patchers.values():
                patcher.unpatch_model()

    def by_comfyui(self, case: LoraCase, strength: float) -> Weights:
        """The way of ComfyUI's own node *Load LoRA*."""
        import comfy.sd
        import comfy.utils

        tensors = comfy.utils.load_torch_file(str(case.path), safe_load=True)
        return self.read(
            *comfy.sd.load_lora_for_models(self.loaded.model, self.loaded.clip, tensors, strength, strength)
        )

    def by_us(self, cases: list[LoraCase], strengths: list[float]) -> Weights:
        """The way of our node, with the files as a stack; the folder of the cases is ComfyUI's for LoRAs."""
        from impasto.comfyui.exact import apply_stack
        from impasto.comfyui.stack import StackedLora

        stack = [StackedLora(case.path.name, s, s) for case, s in zip(cases, strengths, strict=True)]
        model, clip, _ = apply_stack(self.loaded.model, self.loaded.clip, stack)
        return self.read(model, clip)

    def errors(self, found: Weights, cases: list[LoraCase], strengths: list[float]) -> dict[Target, float]:
        """Error of each parameter that the cases change, relative to the change; infinite for one that they do not."""
        wanted: Weights = {}
        for case, strength in zip(cases, strengths, strict=True):
            for target, formula in case.wanted.items():
                place = _plain(target)
                wanted[place] = formula(wanted.get(place, self.own[place].double()), strength)
        errors = {target: self._error(target, found[target], value) for target, value in wanted.items()}
        strays = [t for t in self.own if t not in wanted and not torch.equal(found[t], self.own[t])]
        return errors | dict.fromkeys(strays, float("inf"))

    def _error(self, target: Target, found: torch.Tensor, wanted: torch.Tensor) -> float:
        error = (found.double() - wanted).abs().max().item()
        size = (wanted - self.own[target].double()).abs().max().item()
        if size == 0:
            return 0.0 if error == 0 else float("inf")
        stored = ROOM * FLOAT32 * wanted.abs().max().item()
        return max(error - stored, 0.0) / size if error / size > RELATIVE else error / size


def _plain(target: Target) -> Target:
    return Target(target.network, target.module.removeprefix("text_model."), target.parameter)


def outcome(own: torch.Tensor, found: torch.Tensor, error: float) -> Outcome:
    """Name what became of a parameter."""
    if error <= RELATIVE:
        return "right"
    return "untouched" if torch.equal(own, found) else "wrong"


def single_files() -> Iterator[tuple[str, str, Alpha]]:
    """Every kind in every spelling, alphas taking turns where there may be one; kohya's original names with each."""
    one, absent = sorted((alpha for alpha in ALPHAS if alpha.name in ALPHAS_USED), key=lambda a: a.name, reverse=True)
    turns = itertools.cycle((one, absent))
    for kind, spelling in itertools.product(KINDS, SPELLINGS):
        yield kind, spelling, absent if SPELLINGS[spelling].no_alpha else next(turns)
        if spelling == KOHYA:
            yield kind, spelling, next(turns)


def run(inside: Inside, folder: Path, every: int) -> Result:
    """Run the matrix, or one file in ``every``."""
    result = Result()
    for seed, (kind, spelling, alpha) in enumerate(single_files()):
        if seed % every:
            continue
        path = folder / f"{seed}.safetensors"
        case = write_case(inside.loaded.networks, path, kind, spelling, alpha, "float32", seed)
        if case is None:
            continue
        result.files += 1
        for strength in STRENGTHS:
            groups = [("kind", kind), ("strength", f"{strength:g}")]
            groups += [("kind in kohya", kind)] if spelling == KOHYA else []
            groups += [("spelling of LoRA", spelling)] if kind == "LoRA" else []
            compare(inside, result, case, strength, groups)
        path.unlink()
    for count, turn in itertools.product(STACKS, range(0, TURNS, every)):
        stack(inside, folder, result, count, turn)
    return result


def compare(inside: Inside, result: Result, case: LoraCase, strength: float, groups: list[tuple[str, str]]) -> None:
    """Load one file in both ways."""
    sides: tuple[tuple[dict[tuple[str, str], Tally], Callable[[], Weights]], ...] = (
        (result.ours, lambda: inside.by_us([case], [strength])),
        (result.comfyui, lambda: inside.by_comfyui(case, strength)),
    )
    for side, load in sides:
        try:
            found = load()
        except Exception as error:
            if side is result.ours and not isinstance(error, ImpastoError):
                raise
            if side is result.comfyui:
                result.raised[f"{type(error).__name__} in {case.name.split(' / ')[0]}"] += 1
            found = inside.own
        for target, error in inside.errors(found, [case], [strength]).items():
            verdict = outcome(inside.own[target], found[target], error)
            result.add(side, groups, verdict, error)
            if side is result.ours and error > RELATIVE:
                result.failures.append(f"{case.name} at {strength}: {target.module} is off by {error:.1e}")


def stack(inside: Inside, folder: Path, result: Result, count: int, turn: int) -> None:
    """Put files of mixtures on together with our node."""
    cases = [
        write_mixture(inside.loaded.networks, folder / f"stack{count}-{turn}-{i}.safetensors", 1000 * count + turn + i)
        for i in range(count)
    ]
    strengths = [(1.0, 0.5, -1.0, 1.0, 0.5)[(i + turn) % 5] for i in range(count)]
    found = inside.by_us(cases, strengths)
    for target, error in inside.errors(found, cases, strengths).items():
        result.add(result.ours, [("stack", str(count))], outcome(inside.own[target], found[target], error), error)
        if error > RELATIVE:
            result.failures.append(f"stack of {count}, turn {turn}: {target.module} is off by {error:.1e}")
    for case in cases:
        case.path.unlink()


def table(result: Result, group: str, title: str) -> list[str]:
    """Return a Markdown table of one group, ComfyUI's loader beside our node."""
    lines = [
        f"| {title} | ComfyUI's *Load LoRA* | its worst error | *Load LoRA, exact* | worst error |",
        "|---|---|---:|---|---:|",
    ]
    for key, ours in result.ours.items():
        if key[0] == group:
            theirs = result.comfyui.get(key, Tally())
            worst = f"{theirs.worst:.0e}" if theirs.counts else "-"
            lines.append(f"| {key[1]} | {theirs.text()} | {worst} | {ours.text()} | {ours.worst:.0e} |")
    return [*lines, ""]


def page(result: Result, release: str) -> str:
    """Return the page."""
    stacks = [tally for (group, _), tally in result.ours.items() if group == "stack"]
    lines = [
        "# LoRA files inside ComfyUI, measured",
        "",
        "Made by `python -m tests.comfyui.exact_table`. A small SDXL, with the real one's module names, is loaded by",
        f"ComfyUI {release} (float32, on a CPU). The conformance suite's generator ([LoRA conformance]"
        "(lora-conformance.md)) writes",
        "LoRA files of every kind in every spelling; each goes through ComfyUI's own *Load LoRA* and through",
        "*Load LoRA, exact*, ComfyUI's patcher puts the result on, and every weight and bias is compared with the",
        "float64 formula of the kind.",
        "",
        f"- **{result.files} files**, each at strengths {' and '.join(f'{s:g}' for s in STRENGTHS)}; counted are the"
        " parameters that a file should change.",
        "- *right*: the change is off by at most 1e-5 of its largest number. *untouched*: not changed at all.",
        "  *wrong*: changed to other numbers. An error of 1 is as wrong as doing nothing.",
        f"- *Load LoRA, exact*: **{len(result.failures)} parameters over 1e-5**; also none in "
        f"{sum(tally.counts.total() for tally in stacks)} parameters of",
        f"  {len(STACKS) * TURNS} stacks of {' and '.join(map(str, STACKS))} files of mixed kinds, where the order"
        " counts.",
        "- Where ComfyUI leaves something out or cannot work it out, it says so in the log alone; the picture comes",
        "  out without it. Our node's report counts every module, and a file that fits nothing is an error.",
        "",
        "## By kind, in a spelling that ComfyUI knows",
        "",
        "In kohya's original names, so that what is wrong here is the arithmetic, or a kind that is not read.",
        "",
        *table(result, "kind in kohya", "kind"),
        "## By kind, in all spellings",
        "",
        *table(result, "kind", "kind"),
        "## Plain LoRA, by how the file spells its keys",
        "",
        *table(result, "spelling of LoRA", "spelling"),
        "## By strength",
        "",
        *table(result, "strength", "strength"),
    ]
    if result.raised:
        lines += ["ComfyUI's loader raised, and with it the whole workflow stopped:", ""]
        lines += [f"- {what}: {count} loads" for what, count in result.raised.most_common()]
        lines += [""]
    return "\n".join(lines)


def prove_it_can_fail(inside: Inside, folder: Path) -> None:
    """The comparison sees a strength that is wrong by a thousandth."""
    case = write_case(inside.loaded.networks, folder / "control.safetensors", "LoRA", "lycoris_", ALPHAS[0])
    assert case is not None
    errors = inside.errors(inside.by_us([case], [1.001]), [case], [1.0])
    assert min(errors.values()) > 10 * RELATIVE, errors


def main() -> int:
    """Run, write the page, and return 1 if our node was wrong anywhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="run one file in so many, and write no page")
    every = parser.parse_args().every
    torch.set_num_threads(1)
    enter_comfyui()
    import folder_paths
    from comfyui_version import __version__ as release

    logging.disable(logging.ERROR)  # ComfyUI's, of which each key that it does not know has a line
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.add_model_folder_path("loras", folder, is_default=True)
        inside = Inside(load_small())
        prove_it_can_fail(inside, Path(folder))
        result = run(inside, Path(folder), every)
    text = page(result, release)
    if every == 1 and not result.failures:
        PAGE.write_text(text, encoding="utf-8")
    print(text)
    for failure in result.failures[:50]:
        print("wrong:", failure)
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
