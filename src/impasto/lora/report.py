"""What became of a LoRA that a request asked for, for its user: one line, a table's rows, or JSON.

Knows the words of the report. Knows no formulas, no files and no terminal; imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from impasto.lora.bundles import Bundle
    from impasto.lora.contents import LoraContents, Mismatch

SHOWN: Final = 10  # items of a list that are repeated; its length is always told
SHOWN_CHARACTERS: Final = 200
OWN_FAMILIES: Final = ("SDXL", "SDXL refiner", "unknown")  # what needs no warning: it matched


@dataclass(frozen=True, slots=True)
class Left:
    """Things that were left out: how many, and the first of them."""

    count: int = 0
    first: tuple[Any, ...] = ()

    @classmethod
    def of(cls, items: Sequence[Any]) -> Left:
        """Keep the first few."""
        return cls(len(items), tuple(items[:SHOWN]))

    def to_json(self) -> dict[str, Any]:
        """Return ``{"count": …, "first": […]}``."""
        return {"count": self.count, "first": list(self.first)}


@dataclass(frozen=True, slots=True)
class LoraReport:
    """A LoRA of a request: what it is, and what it did to the model.

    Attributes:
        name: As the user asked for it.
        scale: How strongly it was applied.
        position: Its place in the request's list, from 0.
        resolved: What the name led to, such as a repository's file; empty if it says no more than the name.
        alias_of: The name that this one stands for on this server; ``None``: it is no alias.
        kinds: Kind of patch -> modules.
        ranks: Smallest and largest; ``None`` where no kind in it has a rank.
        applied: Network -> modules that were patched.
        mismatched: Modules that the model has in another shape, as ``{module, file_shape, model_shape}``.
        unmatched: Modules of the file that the model does not have.
        ignored: Keys that are no weights of modules.
        embeddings: Words of the prompt that stand for vectors which it brought.
        base_model: What it was trained for, as far as names, shapes and metadata tell.
        trigger_words: From the metadata.
        sha256: Of the file.
        warnings: Sentences about what the user may not expect.
    """

    name: str
    scale: float = 1.0
    position: int = 0
    resolved: str = ""
    alias_of: str | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    ranks: tuple[int, int] | None = None
    applied: Mapping[str, int] = field(default_factory=dict)
    mismatched: Left = Left()
    unmatched: Left = Left()
    ignored: Left = Left()
    embeddings: tuple[str, ...] = ()
    base_model: str = "unknown"
    trigger_words: tuple[str, ...] = ()
    sha256: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        contents: LoraContents,
        name: str,
        scale: float = 1.0,
        position: int = 0,
    ) -> LoraReport:
        """Sum up what a file turned out to hold."""
        by_parameter = sorted(contents.patches.items(), key=lambda item: item[0].parameter)  # the weight's kind counts
        kinds = {(target.network, target.module): patch.kind for target, patch in by_parameter}
        ranks = [patch.rank for patch in contents.patches.values() if patch.rank is not None]
        return cls(
            name=name,
            scale=scale,
            position=position,
            kinds=dict(Counter(kinds.values()).most_common()),
            ranks=(min(ranks), max(ranks)) if ranks else None,
            applied=dict(Counter(network for network, _ in kinds)),
            mismatched=Left.of([_plain(mismatch) for mismatch in contents.mismatched]),
            unmatched=Left.of([module[:SHOWN_CHARACTERS] for module in contents.unmatched]),
            ignored=Left.of([key[:SHOWN_CHARACTERS] for key in contents.ignored]),
            embeddings=tuple(bundle.word for bundle in contents.bundles if not bundle.problem),
            base_model=contents.base_model,
            trigger_words=contents.trigger_words,
            sha256=contents.sha256,
            warnings=tuple(_warnings(contents, scale)),
        )

    @classmethod
    def unused(cls, name: str, position: int = 0) -> LoraReport:
        """Report a LoRA of scale 0, which is not even read."""
        return cls(name, 0.0, position, warnings=("Its scale is 0, so it does nothing.",))

    def speaking(self, words: Sequence[str], notes: Sequence[str]) -> LoraReport:
        """Return the report of a LoRA of whose words only these were used, with a sentence on each of the others."""
        return replace(self, embeddings=tuple(words), warnings=(*self.warnings, *notes))

    def named(self, name: str, resolved: str = "", alias_of: str | None = None) -> LoraReport:
        """Return the report under the name that the user gave, with what that name led to."""
        alias = () if alias_of is None else (f"{name[:SHOWN_CHARACTERS]!r} stands for {alias_of!r} on this server.",)
        warnings = alias + self.warnings
        return replace(self, name=name, resolved=resolved, alias_of=alias_of, warnings=warnings)

    @property
    def modules(self) -> int:
        """How many modules were patched, in all networks."""
        return sum(self.applied.values())

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, as the prediction has them: ``path`` is the name as asked."""
        return {
            "path": self.name,
            "scale": self.scale,
            **({"resolved": self.resolved} if self.resolved else {}),
            **({"alias_of": self.alias_of} if self.alias_of is not None else {}),
            "applied": dict(self.applied),
            "kinds": dict(self.kinds),
            "ranks": None if self.ranks is None else list(self.ranks),
            "mismatched": self.mismatched.to_json(),
            "unmatched": self.unmatched.to_json(),
            "ignored": self.ignored.to_json(),
            "embeddings": list(self.embeddings),
            "base_model": self.base_model,
            "trigger_words": list(self.trigger_words),
            "sha256": self.sha256,
            "warnings": list(self.warnings),
        }

    def line(self) -> str:
        """Return one line for a log: no line breaks, whatever the names hold."""
        parts = [f"{_what(self)} on {self.modules} modules ({_counts(self.applied) or 'none'})"]
        parts += [f"{left.count} {word}" for word, left in _left(self) if left.count]
        if self.sha256:
            parts.append(f"sha256 {self.sha256[:12]}")
        return f"{self.name[:SHOWN_CHARACTERS]!r} at {self.scale:g}: {', '.join(parts)}"

    def rows(self) -> list[tuple[str, str]]:
        """Return the report as labels and texts, one line of a table each; what says nothing is left out."""
        rows = [
            ("LoRA", self.name),
            ("resolved", self.resolved),
            ("alias of", self.alias_of or ""),
            ("base model", self.base_model),
            ("kinds", _counts(self.kinds)),
            ("rank", _rank(self.ranks)),
            ("applied", _counts(self.applied)),
            *((word, _listed(left)) for word, left in _left(self)),
            ("embeddings", ", ".join(self.embeddings)),
            ("trigger words", ", ".join(self.trigger_words)),
            ("sha256", self.sha256),
            *(("warning", warning) for warning in self.warnings),
        ]
        return [(label, text) for label, text in rows if text]


def _left(report: LoraReport) -> list[tuple[str, Left]]:
    return [("unmatched", report.unmatched), ("mismatched", report.mismatched), ("ignored", report.ignored)]


def _what(report: LoraReport) -> str:
    kinds = " + ".join(report.kinds) or "nothing"
    return f"{kinds} of rank {_rank(report.ranks)}" if report.ranks else kinds


def _rank(ranks: tuple[int, int] | None) -> str:
    if ranks is None:
        return ""
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]} to {ranks[1]}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _listed(left: Left) -> str:
    if not left.count:
        return ""
    items = "\n".join(_item(item) for item in left.first)
    rest = left.count - len(left.first)
    return f"{left.count}\n{items}" + (f"\n… and {rest} more" if rest else "")


def _item(item: Any) -> str:
    if isinstance(item, dict):
        return f"{item['module']}: file {item['file_shape']}, model {item['model_shape']}"
    return str(item)


def _plain(mismatch: Mismatch) -> dict[str, Any]:
    return {
        "module": mismatch.module[:SHOWN_CHARACTERS],
        "file_shape": list(mismatch.file_shape),
        "model_shape": list(mismatch.model_shape),
    }


def _warnings(contents: LoraContents, scale: float) -> list[str]:
    """Say what the user may not expect, a sentence each."""
    left = len(contents.unmatched) + len(contents.mismatched)
    modules = len({(target.network, target.module) for target in contents.patches})
    sentences = []
    if left:
        sentences.append(
            f"{left} of its {left + modules} modules do not fit this model and were left out, so it may look weaker."
        )
    if contents.unscaled:
        sentences.append(
            "It does not say how strongly it was meant (its alpha), so alpha was taken to be the rank, as diffusers' "
            "trainers have it; if it is too strong or too weak, change its scale, or keep PEFT's adapter_config.json "
            "beside it."
        )
    sentences += _unused(contents.bundles)
    if contents.base_model not in OWN_FAMILIES:
        sentences.append(f"It was made for {contents.base_model}; what it does here is not what its trainer saw.")
    if scale == 0:
        sentences.append("Its scale is 0, so it does nothing.")
    return sentences


def _unused(bundles: Sequence[Bundle]) -> list[str]:
    """Say of the embeddings that cannot be used why, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for bundle in bundles:
        if bundle.problem:
            reasons.setdefault(bundle.problem, []).append(bundle.word[:SHOWN_CHARACTERS])
    return [f"{_brought(words)} not applied: it {problem}." for problem, words in list(reasons.items())[:SHOWN]]


def _brought(words: Sequence[str]) -> str:
    """Name embeddings by their words, as the subject of a sentence."""
    named = ", ".join(repr(word) for word in words[:SHOWN] if word)
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    if len(words) == 1:
        return f"The embedding{f' for {named}' if named else ''} that it brings was"
    return f"Each of the embeddings for {named}{more} that it brings was"
