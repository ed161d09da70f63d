"""OpenAI's images API: ``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``.

Knows the routes and the answers of that dialect. Knows nothing of its parameters (``openai_form.py``) or of how a job
is made (``intake.py``). Requests are always held until their pictures are made; there is nothing to poll.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Final

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from impasto.api.auth import CallerDep
from impasto.api.body import parse_object, read_body
from impasto.api.hold import finished, listening
from impasto.api.intake import Draft, accepted, idempotency_key
from impasto.api.openai_answer import Answers
from impasto.api.openai_body import Multipart, is_multipart, read_multipart
from impasto.api.openai_errors import GONE, OpenAIRoute
from impasto.api.openai_form import (
    ImageForm,
    ModelName,
    from_form,
    model_names,
    painted_mask,
    start_picture,
)
from impasto.api.openai_schemas import EDIT, GENERATION, ImagesAnswer, Model, ModelList, refusals
from impasto.api.openai_stream import ImageStream
from impasto.api.service import Service, ServiceDep
from impasto.api.view import Links
from impasto.errors import FieldError, InvalidInput, Unavailable
from impasto.jobs.keys import Key
from impasto.jobs.records import Job
from impasto.jobs.states import TERMINAL

_BORN: Final = 1690329600  # 2023-07-26, the day of SDXL 1.0
_OWNER: Final = "impasto"


def router() -> APIRouter:
    """Return the routes, and last the answer for other paths under ``/v1``."""
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAIRoute)
    for path, endpoint, body in (("generations", generations, GENERATION), ("edits", edits, EDIT)):
        routes.add_api_route(
            f"/images/{path}",
            endpoint,
            methods=["POST"],
            operation_id=f"openai_{path}",
            response_model=ImagesAnswer,
            responses=refusals(400, 401, 404, 413, 429, 504),
            openapi_extra={"requestBody": body},
        )
    routes.add_api_route("/models", models, methods=["GET"], response_model=ModelList, responses=refusals(401))
    routes.add_api_route(
        "/models/{name:path}", model, methods=["GET"], response_model=Model, responses=refusals(401, 404)
    )
    every = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    routes.add_api_route("/{path:path}", elsewhere, methods=every, include_in_schema=False)
    return routes


async def generations(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Make pictures from a prompt."""

    async def form() -> ImageForm:
        body = await read_body(request, service.settings.max_body_bytes)
        return await to_thread.run_sync(lambda: ImageForm.read(parse_object(body)), limiter=service.readers)

    return await _made(request, service, key, "image_generation", form)


async def edits(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Draw over a picture, or only where the mask is transparent."""
    if not is_multipart(request):
        raise InvalidInput("", "not a form: send multipart/form-data, with the picture as the file image")

    async def form() -> ImageForm:
        parts = await read_multipart(request, service.settings.max_body_bytes)
        return await to_thread.run_sync(_edit_form, parts, limiter=service.readers)

    return await _made(request, service, key, "image_edit", form)


def _edit_form(parts: Multipart) -> ImageForm:
    """Turn a form's parts into the words of the model's form; in a thread, because pictures are decoded."""
    given, pictures, masks = from_form(parts.texts), parts.pictures("image"), parts.pictures("mask")
    if not pictures:
        raise InvalidInput("image", 'property "image" is missing')
    if len(pictures) > 1:
        raise InvalidInput("image", f"takes one picture, got {len(pictures)}")
    if parts.pictures("markup"):
        given["markup"] = True
    size = str(given.get("size") or "auto").strip().lower()
    given |= start_picture(pictures[0], sized=size != "auto")
    if masks:
        given["mask"] = painted_mask(masks[0])
    return ImageForm.read(given)


async def _made(
    request: Request, service: Service, key: Key, kind: str, read: Callable[[], Awaitable[ImageForm]]
) -> Response:
    """Read the request, have its pictures made, and answer with them, or with events of type ``kind``."""
    async with AsyncExitStack() as room:
        await room.enter_async_context(service.bodies.taken(request))
        form, repeat = await read(), idempotency_key(request)
        ends = time.monotonic() + service.settings.openai_timeout
        try:
            draft = await to_thread.run_sync(
                Draft.read, form.name.model, form.fields, service, repeat, limiter=service.readers
            )
            form = replace(form, fields={})  # the draft has them; a held request holds no memory for pictures
            answers = Answers(form, service, Links.of(request, service))
            async with listening(request) as hang_up:
                job = await accepted(draft, service, key.id, hang_up)
                del draft
                await room.aclose()
                if job is not None and not form.stream:
                    job = await finished(service, job, hang_up, ends - time.monotonic())
        except FieldError as error:
            raise form.blamed(error) from None
    if job is None:
        return Response(status_code=GONE)
    if form.stream:
        return ImageStream(job, answers, kind, form.partial_images)
    if job.status not in TERMINAL and time.monotonic() < ends:
        raise Unavailable("the service is stopping; send the request again")
    return await run_in_threadpool(_answer, job, answers)


def _answer(job: Job, answers: Answers) -> Response:
    """Return the finished pictures; in a thread."""
    body = json.dumps(answers.finished(job))
    headers = {"Cache-Control": "no-store", "x-request-id": job.id}
    return Response(body, media_type="application/json", headers=headers)


def models(key: CallerDep) -> Response:
    """List the models. Each may carry LoRAs in its name: ``sdxl:owner/name@0.8``."""
    return JSONResponse({"object": "list", "data": [_model(name) for name in model_names()]})


def model(name: str, key: CallerDep) -> Response:
    """Return one model, also one with LoRAs in its name; they are looked for when pictures are made."""
    ModelName.read(name)
    return JSONResponse(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _BORN, "owned_by": _OWNER}


async def elsewhere(request: Request, path: str, key: CallerDep) -> Response:
    """Say that there is nothing, in this dialect's form."""
    if path in ("images/generations", "images/edits", "models"):
        raise HTTPException(405, f"Invalid method for URL ({request.method} /v1/{path})")
    raise HTTPException(404, f"Invalid URL ({request.method} /v1/{path[:100]})")
