"""Why something could not be fetched, in words that may be shown to whoever gave the address.

Knows reasons. Knows no fields: callers turn a failure into the error of the field that asked for it.
"""

from __future__ import annotations

from typing import Final, Literal

Reason = Literal[
    "address",  # not an address that is fetched: scheme, port, user name, form
    "unreachable",  # no answer; deliberately also every host that may not be dialled
    "slow",  # no whole answer within the time
    "status",  # the site answered with an error; ``status`` has it
    "too_large",
    "broken",  # the answer broke off or breaks the protocol
    "mismatch",  # whole, but not the bytes the site said it would be
    "content",  # not the kind of file that was asked for
    "choice",  # the site has none, or several, of what was asked for
    "no_space",  # the disk here is full
    "stopped",  # nobody waits for it any more
]

# One text for "we may not dial it", "nobody listens" and "no such name": the difference would map a private network.
UNREACHABLE: Final = "could not be reached: give a public address that answers, or have the operator allow its host"


class FetchFailed(Exception):
    """Something could not be fetched; ``str`` is the rest of a sentence whose subject the caller puts in front.

    Attributes:
        reason: The kind of failure.
        status: HTTP status of the site's answer, with reason ``status``.
        code: The site's own error code, where it has one.
        retry_after: Seconds that the site asks to wait.
    """

    def __init__(
        self,
        reason: Reason,
        problem: str,
        *,
        status: int | None = None,
        code: str = "",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(problem)
        self.reason: Reason = reason
        self.status = status
        self.code = code
        self.retry_after = retry_after

    def of(self, subject: str) -> FetchFailed:
        """Return the same failure of something that belongs to what was asked for; ``subject`` leads up to it."""
        retry = self.retry_after
        return FetchFailed(self.reason, f"{subject} {self}", status=self.status, code=self.code, retry_after=retry)

    @property
    def away(self) -> bool:
        """Whether the site could not answer at all, so that what was fetched earlier may stand in."""
        overloaded = self.status is not None and (self.status == 429 or self.status >= 500)
        return self.reason in ("unreachable", "slow", "broken") or overloaded


def unreachable() -> FetchFailed:
    """Return the failure that tells nothing of the network here."""
    return FetchFailed("unreachable", UNREACHABLE)
