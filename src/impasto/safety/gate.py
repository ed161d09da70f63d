"""The one place that pictures pass on their way out, and prompts and start pictures on their way in.

Knows the operator's rules and a checker. Knows no jobs, files or settings, and no torch. It fails closed: a picture
that could not be checked is not passed.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from impasto.errors import CheckFailed, ContentRefused
from impasto.safety.action import Action, replaced
from impasto.safety.checker import ImageChecker, Verdict
from impasto.safety.denylist import DenyList

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SafetyGate:
    """The rules of one service.

    Attributes:
        checker: Looks at pictures; ``None``: nobody does.
        action: What becomes of a flagged picture.
        allow_disable: Whether a request may do without the checker.
        check_inputs: Whether start pictures are checked, too.
        previews: Whether previews are shown, which nobody checks, of pictures that will be checked.
        seconds: Longest time for a check.
        denylist: What prompts may not have.
    """

    checker: ImageChecker | None = None
    action: Action = "black"
    allow_disable: bool = True
    check_inputs: bool = False
    previews: bool = True
    seconds: float = 60.0
    denylist: DenyList = field(default_factory=DenyList)

    def checks(self, wanted: bool) -> bool:
        """Whether pictures are checked of a request that does, or does not, want it."""
        return self.checker is not None and (wanted or not self.allow_disable)

    def shows_previews(self, wanted: bool) -> bool:
        """Whether previews may be shown of a request that does, or does not, want its pictures checked."""
        return self.previews or not self.checks(wanted)

    def admit(self, prompt: str, image: Image | None, wanted: bool) -> None:
        """Check what a request starts from, before anything is drawn.

        Raises:
            InvalidInput: The prompt has something of the deny-list.
            ContentRefused: The start picture was flagged.
            CheckFailed: It could not be checked.
        """
        self.denylist.check("prompt", prompt)
        if image is not None and self.check_inputs and self.checks(wanted) and self._verdict(image).flagged:
            raise ContentRefused("image was flagged by the safety checker; start from another picture")

    def passed(self, image: Image, wanted: bool) -> tuple[Image, bool]:
        """Return a finished picture as it may be shown, and whether it was flagged.

        Raises:
            ContentRefused: It was flagged, and the action is ``error``.
            CheckFailed: It could not be checked.
        """
        if not self.checks(wanted) or not self._verdict(image).flagged:
            return image, False
        return replaced(image, self.action), True

    def _verdict(self, image: Image) -> Verdict:
        """Return the checker's verdict, in time, or raise ``CheckFailed``."""
        assert self.checker is not None
        answer: Future[Verdict] = Future()
        # A thread of its own, which a checker that hangs may keep: nothing that ends waits for it.
        threading.Thread(target=_check, args=(self.checker, image, answer), name="safety-check", daemon=True).start()
        try:
            verdict = answer.result(self.seconds)
        except Exception as error:
            what = f"took longer than {self.seconds:g} s" if isinstance(error, TimeoutError) else "failed"
            log.error("the safety checker %s %s", self.checker.name, what, exc_info=error)
            raise CheckFailed(
                "the safety checker did not work, so nothing is shown; try again later, and if it goes on, "
                "the server's log has the reason"
            ) from error
        if verdict.flagged:
            log.info("the safety checker %s flagged a picture, score %.3f", verdict.checker, verdict.score)
        return verdict


def _check(checker: ImageChecker, image: Image, answer: Future[Verdict]) -> None:
    """Have a picture checked and leave the verdict, or what went wrong, in ``answer``."""
    try:
        [verdict] = checker.check([image.convert("RGB")])
    except Exception as error:  # noqa: BLE001  (it is raised where the answer is read)
        answer.set_exception(error)
    else:
        answer.set_result(verdict)
