"""Everything that can go wrong in a request, as one body: ``{"code", "message", "error"}`` with the HTTP status.

Knows our exception tree and the framework's own exceptions. Knows nothing of what any route does.
``message`` and ``error`` say the same: some clients read the one, some the other. ``error`` occurs in error bodies
alone, because one client takes its mere presence for a failure.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from impasto.api.headers import SECURITY_HEADERS
from impasto.errors import FieldError, ImpastoError, RetryLater, Unauthorized
from impasto.logs import told

log = logging.getLogger(__name__)


def sentence(error: ImpastoError) -> str:
    """Return the text for the client; a failed job's says the same of a field, without the first words."""
    if not isinstance(error, FieldError):
        return error.located
    return f"invalid request body{',' if error.field else ':'} {error.located}"


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the one error body that every client of the wire understands."""
    return JSONResponse({"code": status, "message": message, "error": message}, status, headers)


def install(app: FastAPI) -> None:
    """Make every exception that leaves a route an error body."""
    app.add_exception_handler(ImpastoError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, ImpastoError)
    headers: dict[str, str] = {}
    if isinstance(error, RetryLater):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return error_response(error.status, sentence(error), headers)


async def _http(request: Request, error: Exception) -> Response:
    """Routing errors: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    known = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not possible here"}
    return error_response(error.status_code, known.get(error.status_code, str(error.detail)), dict(error.headers or {}))


async def _validation(request: Request, error: Exception) -> Response:
    """A declared path or query parameter is wrong. The value is not repeated: it may be large, or not be JSON."""
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return error_response(400, f"invalid request, {problems}")


async def _gone(request: Request, error: Exception) -> Response:
    """The client hung up while sending; nobody reads this."""
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> Response:
    """A fault of ours: the details go to the log (the server writes the trace), never to the client."""
    log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
    headers = dict(SECURITY_HEADERS)  # this answer is made outside of what adds them, and the next
    if request_id := told().get("request_id"):
        headers["X-Request-Id"] = request_id
    return error_response(500, "internal error; the log of the service has the details", headers)
