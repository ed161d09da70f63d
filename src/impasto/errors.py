"""Every error a user can meet, with its HTTP status and a message that is safe to show.

::

    ImpastoError                500
    ├── InvalidInput            400  a request field has a wrong value; ``field`` is its path
    │   └── MediaError          400  a picture cannot be had
    ├── Unauthorized            401  no key, or one we do not know
    ├── Forbidden               403  this key may not do that
    ├── NotFound                404  no such thing, or not yours
    ├── BadRequest              400  something outside the body is wrong: a header, a query parameter
    ├── Conflict                409  the request does not fit an earlier one
    ├── PayloadTooLarge         413  the body is over the limit
    ├── TooManyRequests         429  over a limit of this key (``retry_after`` seconds)
    ├── Unavailable             503  try again later (``retry_after`` seconds)
    ├── ContentRefused          400  the safety checker flagged a picture
    ├── PredictionFailed        500  a job of the server we are a client of ended without pictures
    ├── CheckFailed             500  the safety checker did not work, so nothing may be shown
    ├── ModelError              500  a checkpoint cannot be loaded
    ├── LoraError               400  a LoRA cannot be found, read or applied; ``field`` names it
    ├── ConfigError             500  a setting is wrong; start-up stops
    └── IllegalMove             500  a job was asked to go where its state does not lead

Knows nothing of HTTP libraries: ``api/errors.py`` turns these into responses.
"""

from __future__ import annotations


class ImpastoError(Exception):
    """Base of all our errors. ``str(error)`` is one sentence for the user: no secrets, paths or traces."""

    status = 500
    field: str | None = None  # dotted path of the request field at fault, such as ``loras.0.scale``

    @property
    def located(self) -> str:
        """The message for clients of the API, who know a field by its JSON pointer."""
        return str(self)


class FieldError(ImpastoError):
    """An error that points at one field of the request."""

    status = 400

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem

    @property
    def located(self) -> str:
        """The message with the field as a JSON pointer, ``""`` being the whole body."""
        return f'Error at "/{self.field.replace(".", "/")}": {self.problem}' if self.field else self.problem


class InvalidInput(FieldError):
    """A field has a wrong type or value; the message says what would be right."""


class MediaError(InvalidInput):
    """A picture could not be fetched or is not there any more."""


class LoraError(FieldError):
    """A LoRA could not be found, read or applied."""


class Unauthorized(ImpastoError):
    """No API key was sent, or not one of ours."""

    status = 401


class Forbidden(ImpastoError):
    """The key is one of ours, and was made without the right to do this."""

    status = 403


class NotFound(ImpastoError):
    """There is no such thing, or it belongs to another key: both look the same from outside."""

    status = 404


class BadRequest(ImpastoError):
    """A header or another part outside the body is wrong; the message names it."""

    status = 400


class Conflict(ImpastoError):
    """The request does not fit an earlier one of the same key."""

    status = 409


class PayloadTooLarge(ImpastoError):
    """The request body is over the limit."""

    status = 413


class RetryLater(ImpastoError):
    """The same request may succeed after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyRequests(RetryLater):
    """This key is over one of its limits; others are not affected."""

    status = 429


class Unavailable(RetryLater):
    """The service cannot take this now."""

    status = 503


class ContentRefused(ImpastoError):
    """The safety checker flagged a start picture, or a finished one where the operator gives none in its place."""

    status = 400


class PredictionFailed(ImpastoError):
    """A job of the server that we are a client of ended without pictures; the message is the server's."""


class CheckFailed(ImpastoError):
    """The safety checker failed or took too long: what it could not see is not shown."""


class ModelError(ImpastoError):
    """A model folder or file cannot be loaded; the message says what it is and what is missing."""


class ConfigError(ImpastoError):
    """A setting is wrong; nothing starts until it is mended."""


class IllegalMove(ImpastoError):
    """A job was asked to go to a state that its present state does not lead to."""
