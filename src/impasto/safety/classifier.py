"""Image classifiers in the transformers format as checkers, such as Falconsai's and Freepik's.

Knows transformers, torch, and which labels are harmless by their names. Knows nothing of where the files come from.
Imported when such a checker is set, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from impasto.errors import ConfigError
from impasto.safety.checker import Verdict
from impasto.safety.weights import Source

if TYPE_CHECKING:
    from PIL.Image import Image

THRESHOLD: Final = 0.5
# Labels that do not count, unless they are asked for. "low" of a scale is swimwear, say, and not more.
HARMLESS: Final = frozenset({"normal", "neutral", "safe", "sfw", "drawing", "drawings", "low"})


class ClassifierChecker:
    """Adds up the probabilities of the labels that count.

    Args:
        source: Where its files are.
        labels: The labels that count; empty: all but the ``HARMLESS``.
        threshold: Pictures with at least this sum are flagged.
        device: Where it runs.

    Raises:
        ConfigError: The files do not make a whole classifier, or its labels do not tell what counts.
    """

    name = "hf"

    def __init__(
        self, source: Source, labels: Sequence[str] = (), threshold: float | None = None, device: str = "cpu"
    ) -> None:
        self._threshold = THRESHOLD if threshold is None else threshold
        self._device = torch.device(device)
        self._processor, model = _load(source)
        self._model = model.eval().to(self._device)
        self._labels = [str(model.config.id2label[i]).lower() for i in range(model.config.num_labels)]
        self._counted = _counted(self._labels, labels)
        self.version = f"{source.version}, {'+'.join(sorted(self._counted))}, {self._threshold:g}"

    @torch.inference_mode()
    def check(self, images: Sequence[Image]) -> list[Verdict]:
        """Return one verdict for each picture; their categories are the labels."""
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(self._device)
        probabilities = self._model(pixel_values=pixels).logits.float().softmax(-1).cpu().tolist()
        return [self._verdict(dict(zip(self._labels, row, strict=True))) for row in probabilities]

    def _verdict(self, categories: dict[str, float]) -> Verdict:
        score = sum(categories[label] for label in self._counted)
        return Verdict(score >= self._threshold, score, self.name, categories)


def _load(source: Source) -> tuple[Any, Any]:
    """Load preprocessor and network; a weight that is missing would be random, so it is an error."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoImageProcessor.from_pretrained(source.folder, **local)
        model, told = AutoModelForImageClassification.from_pretrained(
            source.folder, use_safetensors=True, output_loading_info=True, **local
        )
    except Exception as error:
        raise ConfigError(f"safety_checker: {source.version} is no image classifier that loads ({error})") from error
    lost = [*told["missing_keys"], *told["mismatched_keys"]]
    if lost:
        raise ConfigError(f"safety_checker: {source.version} lacks weights of its network, such as {lost[0]}")
    return processor, model


def _counted(known: Sequence[str], asked: Sequence[str]) -> frozenset[str]:
    wanted = frozenset(label.lower() for label in asked)
    if wanted - set(known):
        raise ConfigError(f"safety_checker: no label {', '.join(sorted(wanted - set(known)))}; {_listed(known)}")
    counted = wanted or frozenset(known) - HARMLESS
    if not wanted and len(counted) == len(known):
        raise ConfigError(f"safety_checker: which labels count? Name them after a #; {_listed(known)}")
    return counted


def _listed(labels: Sequence[str]) -> str:
    return f"there are: {', '.join(labels[:20])}"
