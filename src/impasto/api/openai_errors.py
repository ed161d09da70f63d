"""What goes wrong under ``/v1``, in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``.

Knows our exception tree and that form. Knows nothing of what any route does. The other paths keep the body of
``errors.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from impasto.errors import FieldError, ImpastoError, RetryLater, Unauthorized

log = logging.getLogger(__name__)

ROOT: Final = "/v1/"
GONE: Final = 499  # nobody reads this answer
INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"
NO_RETRY: Final = {"x-should-retry": "false"}  # the official clients would send the request again
_TYPES: Final[Mapping[int, str]] = {429: "rate_limit_error"}
_CODES: Final[Mapping[int, str]] = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}


class ModelNotFound(ImpastoError):
    """No model has this name."""

    status = 404


class JobFailed(ImpastoError):
    """The pictures could not be made; sending the same again would fail again.

    Attributes:
        param: The parameter at fault, where one is.
        code: One word for programs.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str = "generation_failed", status: int = 500
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """Return the body of a refusal."""
    kind = _TYPES.get(status, INVALID if status < 500 else SERVER)
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def refusal(error: ImpastoError) -> Response:
    """Return the answer that one of our errors means."""
    headers: dict[str, str] = {}
    if isinstance(error, RetryLater):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, JobFailed):
        headers |= NO_RETRY
    return JSONResponse(_body(error), error.status, headers)


def _body(error: ImpastoError) -> dict[str, Any]:
    match error:
        case FieldError():
            param = parameter(error.field or "")
            missing = error.problem.endswith("is missing")
            message = f"Missing required parameter: '{param}'." if missing else f"'{param}' {error.problem}."
            code = "missing_required_parameter" if missing else "invalid_value"
            return error_body(error.status, message if param else f"The body is {error.problem}.", param or None, code)
        case ModelNotFound():
            return error_body(error.status, str(error), "model", "model_not_found")
        case JobFailed():
            return error_body(error.status, str(error), error.param, error.code)
        case _:
            return error_body(error.status, str(error))


def parameter(path: str) -> str:
    """Write a dotted path as these clients do: ``loras.0.scale`` as ``loras[0].scale``."""
    first, *rest = path.split(".")
    return first + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in rest)


class OpenAIRoute(APIRoute):
    """A route whose refusals have OpenAI's form, those of the framework and of the key check among them."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """Wrap the route."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except ImpastoError as error:
                return refusal(error)
            except HTTPException as error:
                return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)
            except RequestValidationError:
                return JSONResponse(error_body(400, "a parameter of the address is wrong"), 400)
            except ClientDisconnect:
                return Response(status_code=GONE)
            except Exception as error:
                log.error("%s %s failed", request.method, request.url.path, exc_info=error)
                message = "internal error; the log of the service has the details"
                return JSONResponse(error_body(500, message), 500)

        return handled
