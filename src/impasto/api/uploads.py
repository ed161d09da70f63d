"""Files sent ahead of a request: by ticket and PUT, or as a form; in both versions of the API.

Knows the routes, the order of things and which files are taken: pictures, and LoRAs. Knows nothing of rows and quotas
(``jobs/uploads.py``). A file's type is found in its bytes; its name and the type that a client claims are believed in
nothing but the ending of its address, which a ticket has to tell before the file comes.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from impasto.api.auth import CallerDep
from impasto.api.body import parse_object, read_body
from impasto.api.fields import shown
from impasto.api.incoming import FIELD, FormFile, check_announced, spooled
from impasto.api.limits import storing
from impasto.api.models import VERSIONS
from impasto.api.schemas import responses
from impasto.api.service import Service, ServiceDep
from impasto.api.view import Links
from impasto.errors import InvalidInput
from impasto.jobs.outputs import LORA_TYPE, UPLOAD_EXTENSIONS
from impasto.jobs.uploads import Upload
from impasto.lora.cog import is_archive
from impasto.lora.gate import FORMAT_HEADER, check_header
from impasto.tensorfile import LENGTH, PROBE

MAX_NAME_CHARS: Final = 255
UNNAMED: Final = "file"
_UNKNOWN: Final = "bin"  # the ending of an address whose file has not come and is not said to be anything
_LORA: Final = UPLOAD_EXTENSIONS[LORA_TYPE]
_ENDINGS: Final = {".jpeg": "jpg", ".tar": _LORA} | {f".{ending}": ending for ending in UPLOAD_EXTENSIONS.values()}
_WEIGHTS: Final = frozenset({".safetensors", ".tar", ".ckpt", ".pt", ".pth", ".bin", ".gguf"})  # meant as LoRAs


class Uploaded(BaseModel):
    """A file that can be named in requests."""

    type: Literal["image", "lora"]
    download_url: str = Field(
        description="Readable without a key. Pass it on as `image`, `mask_image` or a LoRA's path."
    )
    filename: str
    size: int = Field(description="Bytes.")


class Instruction(BaseModel):
    """How the file is to be sent."""

    method: Literal["PUT"] = "PUT"
    url: str = Field(description="Takes the file once, without a key, for an hour.")
    headers: dict[str, str] = Field(description="Headers to send with it.")


class TicketGiven(Uploaded):
    """Where to send a file, and where it will be."""

    upload: Instruction


class UploadedEnvelope(BaseModel):
    """A success: HTTP 200 and ``code`` 200."""

    code: Literal[200] = 200
    message: Literal["success"] = "success"
    data: Uploaded


class TicketEnvelope(UploadedEnvelope):
    """A success: HTTP 200 and ``code`` 200."""

    data: TicketGiven


_TICKET_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["filename"],
    "properties": {
        "filename": {"type": "string", "minLength": 1, "description": "Shown again; never a path."},
        "size": {"type": "integer", "minimum": 1, "description": "Bytes; the file may not have more."},
        "content_type": {"type": "string", "description": "Not believed: the bytes say what the file is."},
    },
    "example": {"filename": "fox.png", "size": 123456, "content_type": "image/png"},
}
_FORM_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": [FIELD],
    "properties": {
        FIELD: {
            "type": "string",
            "format": "binary",
            "description": "A picture, or a LoRA: .safetensors, or cog-sdxl's .tar.",
        }
    },
}


async def announce(request: Request, service: ServiceDep, key: CallerDep) -> TicketEnvelope:
    """Say that a file will be sent, and learn where to."""
    service.disk.check()
    body = await read_body(request, service.settings.max_body_bytes)
    fields = parse_object(body, request.headers.get("content-type", ""))
    filename, size, claimed = _filename(fields), _size(fields, service.settings.max_upload_bytes), _claimed(fields)
    ticket, secret = await run_in_threadpool(service.uploads.announce, key.id, filename, size)
    links, ending = Links.of(request, service), _ending(filename, claimed)
    return TicketEnvelope(
        data=TicketGiven(
            type="lora" if ending == _LORA else "image",
            download_url=address(links, ticket.id, ending),
            filename=filename,
            size=size,
            upload=Instruction(
                url=f"{links.base}/api/{links.version}/media/uploads/{secret}",
                headers={"Content-Type": claimed or LORA_TYPE},
            ),
        )
    )


async def receive(
    ticket: Annotated[str, PathParameter(description="The secret in the ticket's URL.")],
    request: Request,
    service: ServiceDep,
) -> UploadedEnvelope:
    """Take the file of a ticket. Nothing half-sent is kept: the same ticket can be tried again within its hour."""
    announced = await run_in_threadpool(service.uploads.ticket, ticket)
    most = service.settings.max_upload_bytes
    limit = min(announced.size or most, most)
    check_announced(request, limit)
    service.disk.check(_announced_bytes(request))
    with storing():
        async with spooled(request.stream(), service.settings.incoming_dir, limit) as file:
            content_type = await _checked(file, announced.filename, service)
            upload = await run_in_threadpool(service.uploads.receive, announced, file, content_type)
    return _done(upload, Links.of(request, service))


async def take_form(request: Request, service: ServiceDep, key: CallerDep) -> UploadedEnvelope:
    """Take a file from a form's field `file`."""
    form, limit = FormFile(request), service.settings.max_upload_bytes
    service.disk.check(min(_announced_bytes(request), limit))
    with storing():
        async with spooled(form.chunks(limit), service.settings.incoming_dir, limit) as file:
            filename = _plain(form.filename)
            content_type = await _checked(file, filename, service)
            upload = await run_in_threadpool(service.uploads.add, key.id, filename, file, content_type)
    return _done(upload, Links.of(request, service))


def _announced_bytes(request: Request) -> int:
    """Return the length that a body is said to have; 0 if that is not said."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def address(links: Links, upload_id: str, ending: str) -> str:
    """Return where an upload is read, without a key: its id is the secret, its ending is for people."""
    return f"{links.base}/uploads/{upload_id}.{ending}"


def router() -> APIRouter:
    """Return the routes of both versions."""
    routes = APIRouter(tags=["uploads"])
    for version in VERSIONS:
        media = f"/api/{version}/media"
        routes.add_api_route(
            f"{media}/uploads",
            announce,
            methods=["POST"],
            summary="Announce a file",
            operation_id=f"announce_upload_{version}",
            response_model=TicketEnvelope,
            responses=responses(400, 401, 413, 429),
            openapi_extra=_body("application/json", _TICKET_BODY),
        )
        routes.add_api_route(
            f"{media}/uploads/{{ticket}}",
            receive,
            methods=["PUT"],
            summary="Send an announced file",
            operation_id=f"receive_upload_{version}",
            response_model=UploadedEnvelope,
            responses=responses(400, 404, 413, 429),
            openapi_extra=_body(LORA_TYPE, {"type": "string", "format": "binary"}),
        )
        routes.add_api_route(
            f"{media}/upload/binary",
            take_form,
            methods=["POST"],
            summary="Send a file as a form",
            operation_id=f"upload_form_{version}",
            response_model=UploadedEnvelope,
            responses=responses(400, 401, 413, 429),
            openapi_extra=_body("multipart/form-data", _FORM_BODY),
        )
    return routes


def _body(content_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}}


def _done(upload: Upload, links: Links) -> UploadedEnvelope:
    kind: Literal["image", "lora"] = "lora" if upload.content_type == LORA_TYPE else "image"
    url = address(links, upload.id, UPLOAD_EXTENSIONS[upload.content_type])
    return UploadedEnvelope(data=Uploaded(type=kind, download_url=url, filename=upload.filename, size=upload.size))


async def _checked(file: Path, filename: str, service: Service) -> str:
    """Return the file's content type; in one of the threads for pictures, since a whole one is read."""
    return await to_thread.run_sync(content_type_of_file, file, filename, limiter=service.readers)


def content_type_of_file(file: Path, filename: str) -> str:
    """Return the content type that a file's bytes say; its name counts only for the words of a refusal.

    Raises:
        InvalidInput: It is no picture.
        LoraError: It is meant as a LoRA and is none.
    """
    from impasto.images import begins_like_picture, check_bytes, check_picture

    with file.open("rb") as opened:
        start = opened.read(PROBE)
        if begins_like_picture(start):
            check_bytes(file.stat().st_size, FIELD)
            return check_picture(start + opened.read(), FIELD)
    if _begins_like_weights(start) or PurePosixPath(filename).suffix.lower() in _WEIGHTS:
        check_header(file, FIELD)
        return LORA_TYPE
    try:
        return check_picture(start, FIELD)
    except InvalidInput as error:
        raise InvalidInput(FIELD, f"{error.problem}, or a LoRA as .safetensors") from None


def _begins_like_weights(start: bytes) -> bool:
    """Whether a JSON header of a possible length stands at the beginning, as in .safetensors files; or it is a tar."""
    return is_archive(start) or (start[8:9] == b"{" and LENGTH.unpack(start[:8])[0] <= FORMAT_HEADER)


def _filename(fields: dict[str, Any]) -> str:
    value = fields.get("filename")
    if value is None:
        raise InvalidInput("filename", 'property "filename" is missing')
    if not isinstance(value, str):
        raise InvalidInput("filename", f"must be a string, got {shown(value)}")
    return _plain(value)


def _plain(filename: str) -> str:
    """Return a file name that can be stored and shown; it is never part of a path."""
    text = filename.encode("utf-8", "replace").decode("utf-8")
    return "".join(char for char in text if char.isprintable())[:MAX_NAME_CHARS] or UNNAMED


def _size(fields: dict[str, Any], most: int) -> int:
    """Return the bytes announced, 0 if they were not."""
    value = fields.get("size")
    if value is None:
        return 0
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise InvalidInput("size", f"must be an integer, got {shown(value)}")
    if not 1 <= value <= most:
        raise InvalidInput("size", f"must be between 1 and {most} bytes, got {shown(value)}")
    return int(value)


def _claimed(fields: dict[str, Any]) -> str:
    """Return the content type that the client will send along, if it is one."""
    value = fields.get("content_type")
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,60}/[\w.+-]{1,60}", value, re.ASCII) else ""


def _ending(filename: str, claimed: str) -> str:
    by_name = _ENDINGS.get(PurePosixPath(filename).suffix.lower())
    by_type = None if claimed == LORA_TYPE else UPLOAD_EXTENSIONS.get(claimed)
    return by_name or by_type or _UNKNOWN
