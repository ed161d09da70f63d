"""Reading a JSON request body under a size limit, and telling whether two are the same.

Knows bytes, JSON and the limit. Knows nothing of fields. Too large, malformed, endlessly nested or not-a-number
bodies end here as one of our errors, with at most the limit ever held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import Request

from impasto.errors import BadRequest, InvalidInput, PayloadTooLarge

WHOLE_BODY = ""  # the JSON pointer of the document itself
# Between values stand commas. No request has nearly so many values, and each takes a hundred times its bytes in memory.
MAX_COMMAS = 200_000


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body's bytes; stop at the first byte over ``limit``, announced or not.

    What the client still sends after the refusal is thrown away by the server as it arrives, so a client that
    writes its whole body before it reads sees the answer and not a broken connection.

    Raises:
        PayloadTooLarge: The body is longer than ``limit`` bytes.
        BadRequest: The body is packed; what it unpacks to could be anything.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise BadRequest(f"the header Content-Encoding: {encoding[:40]!r} is not taken; send the body unpacked")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def parse_object(body: bytes, content_type: str = "") -> dict[str, Any]:
    """Return the JSON object in ``body``, whatever its content type was said to be; a form is told what to send.

    Raises:
        InvalidInput: Not JSON, JSON with NaN or infinity, or not an object; the position is in the message.
    """
    if body.count(b",") > MAX_COMMAS:
        raise InvalidInput(WHOLE_BODY, f"has more than {MAX_COMMAS} commas, and thus values")
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidInput(WHOLE_BODY, f"not UTF-8 text at byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        remedy = "; send the fields as a JSON object, not as a form" if "form" in content_type else ""
        raise InvalidInput(WHOLE_BODY, f"not valid JSON at {place}: {error.msg}{remedy}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise InvalidInput(WHOLE_BODY, "not valid JSON: a number has too many digits") from None
    if not isinstance(value, dict):
        raise InvalidInput(WHOLE_BODY, "must be a JSON object")
    return value


def fingerprint(model: str, fields: Mapping[str, Any], webhook_url: str | None = None) -> str:
    """Return the SHA-256 of a request, however its JSON was spaced and ordered.

    Raises:
        InvalidInput: It is nested too deeply.
    """
    try:
        text = json.dumps([model, fields, webhook_url], sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise _too_deep() from None
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _too_deep() -> InvalidInput:
    return InvalidInput(WHOLE_BODY, "not valid JSON: nested too deeply")


def _refuse_constant(word: str) -> NoReturn:
    raise InvalidInput(WHOLE_BODY, f"not valid JSON: {word} is not a JSON number")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"request body too large: at most {limit} bytes are taken")
