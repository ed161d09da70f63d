"""A key's own predictions: listed, deleted, cancelled; in both versions of the API.

Knows the routes, their fields and the form of a page. Knows nothing of rows (``jobs/history.py``). In a list, outputs
are always addresses: a page of a hundred base64 answers would have hundreds of megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field

from impasto.api.auth import CallerDep
from impasto.api.body import parse_object, read_body
from impasto.api.fields import Integer, shown
from impasto.api.models import VERSIONS, find_served
from impasto.api.schemas import Envelope, Prediction, Success, Wire, responses
from impasto.api.service import Service, ServiceDep
from impasto.api.view import Links, answer, enveloped, prediction
from impasto.errors import InvalidInput, NotFound
from impasto.jobs.history import Wanted
from impasto.jobs.records import Job, is_job_id
from impasto.jobs.states import Status
from impasto.logs import note
from impasto.types import Bounds

MAX_IDS: Final = 1000  # deleted at once
PAGE: Final = Integer("page", "From 1, the newest.", Bounds(1, 1_000_000, 1), slider=False)
PAGE_SIZE: Final = Integer("page_size", "Predictions on a page.", Bounds(1, 100, 20), slider=False)
EXAMPLE_TIME: Final = "2026-01-31T00:00:00Z"
_STATUSES: Final = tuple(status.value for status in Status)


class Item(Prediction):
    """A prediction in a list; its outputs are addresses even if base64 was asked for."""

    inputs: dict[str, Any] | None = Field(None, description="The fields that were sent, pictures only by their size.")


class Page(Wire):
    """Some of a key's predictions, the newest first."""

    page: int
    page_size: int
    total: int = Field(description="On all pages.")
    has_more: bool
    items: list[Item]


class Deleted(Wire):
    """How many predictions there were to delete."""

    deleted_count: int


_LIST_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        PAGE.name: PAGE.schema(),
        PAGE_SIZE.name: PAGE_SIZE.schema(),
        "created_after": {"type": "string", "format": "date-time", "description": "Made then or later."},
        "created_before": {"type": "string", "format": "date-time", "description": "Made earlier than then."},
        "model": {"type": "string", "description": "Posted to this model."},
        "status": {"type": "string", "enum": list(_STATUSES), "description": "`failed` stands for cancelled ones too."},
        "include_inputs": {"type": "boolean", "default": True, "description": "Whether items have `inputs`."},
    },
    "example": {"page": 1, "page_size": 20, "created_after": EXAMPLE_TIME},
}
_DELETE_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["ids"],
    "properties": {"ids": {"type": "array", "items": {"type": "string"}, "maxItems": MAX_IDS}},
}


async def listed(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Return a page of the key's predictions. No body is all of them, and so is an empty text in a field."""
    fields = await _fields(request, service)
    wanted, with_inputs = _wanted(fields), _flag(fields, "include_inputs", default=True)
    links = Links.of(request, service)

    def read() -> Response:
        jobs, total = service.history.page(key.id, wanted)
        items = [_item(job, service, links, with_inputs) for job in jobs]
        more = wanted.page * wanted.page_size < total
        page = Page(page=wanted.page, page_size=wanted.page_size, total=total, has_more=more, items=items)
        return enveloped(Success[Page](data=page))

    return await run_in_threadpool(read)


async def deleted(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Delete predictions with their files; those that wait or run are stopped. Ids that are not the key's count 0."""
    ids = (await _fields(request, service)).get("ids")
    if ids is None:
        raise InvalidInput("ids", 'property "ids" is missing')
    if not isinstance(ids, list):
        raise InvalidInput("ids", f"must be an array of prediction ids, got {shown(ids)}")
    if len(ids) > MAX_IDS:
        raise InvalidInput("ids", f"takes at most {MAX_IDS} items, got {len(ids)}")
    for index, job_id in enumerate(ids):
        if not isinstance(job_id, str):
            raise InvalidInput(f"ids.{index}", f"must be a string, got {shown(job_id)}")
    note(prediction_ids=[job_id for job_id in ids if is_job_id(job_id)])
    count = await run_in_threadpool(service.history.delete, key.id, ids)
    return enveloped(Success[Deleted](data=Deleted(deleted_count=count)))


def cancelled(prediction_id: str, request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Stop a prediction: a waiting one at once, a running one within about a second. An ended one stays as it is."""
    try:
        job = service.store.cancel(prediction_id, key.id)
    except NotFound:
        raise NotFound("no such prediction") from None
    return answer(job, service, Links.of(request, service))


def router() -> APIRouter:
    """Return the routes of both versions."""
    routes = APIRouter(tags=["predictions"])
    for version in VERSIONS:
        predictions = f"/api/{version}/predictions"
        routes.add_api_route(
            predictions,
            listed,
            methods=["POST"],
            summary="List predictions",
            operation_id=f"list_{version}",
            response_model=Success[Page],
            responses=responses(400, 401, 413),
            openapi_extra=_body(_LIST_BODY),
        )
        routes.add_api_route(
            f"{predictions}/delete",
            deleted,
            methods=["POST"],
            summary="Delete predictions",
            operation_id=f"delete_{version}",
            response_model=Success[Deleted],
            responses=responses(400, 401, 413),
            openapi_extra=_body(_DELETE_BODY, required=True),
        )
        for path, method in (("", "DELETE"), ("/cancel", "POST")):
            routes.add_api_route(
                f"{predictions}/{{prediction_id}}{path}",
                cancelled,
                methods=[method],
                summary="Cancel a prediction",
                operation_id=f"cancel_{method.lower()}_{version}",
                response_model=Envelope,
                responses=responses(401, 404),
            )
    return routes


def _body(schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


async def _fields(request: Request, service: Service) -> dict[str, Any]:
    """Return the body's object; no body is an empty one."""
    body = await read_body(request, service.settings.max_body_bytes)
    return parse_object(body, request.headers.get("content-type", "")) if body.strip() else {}


def _item(job: Job, service: Service, links: Links, with_inputs: bool) -> Item:
    shown_job = prediction(job, service, links, as_urls=True)
    inputs = job.input.get("as_sent", {}) if with_inputs else None
    return Item.model_construct(**dict(shown_job), inputs=inputs)


def _wanted(fields: Mapping[str, Any]) -> Wanted:
    page, page_size = (
        int(field.bounds.default) if fields.get(field.name) is None else field.read(fields[field.name], field.name)
        for field in (PAGE, PAGE_SIZE)
    )
    model, status = _text(fields, "model"), _text(fields, "status").lower()
    if status and status not in _STATUSES:
        raise InvalidInput("status", f"must be one of {', '.join(_STATUSES)}, got {shown(status)}")
    served = find_served(model)
    return Wanted(
        page=page,
        page_size=page_size,
        after=_time(fields, "created_after"),
        before=_time(fields, "created_before"),
        model=served.id if served else model or None,
        status=Status(status) if status else None,
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidInput(name, f"must be a string, got {shown(value)}")
    if "\0" in value or not value.isprintable():
        raise InvalidInput(name, "must be printable text")
    return value.strip()


def _time(fields: Mapping[str, Any], name: str) -> datetime | None:
    """Read an RFC 3339 time; one without an offset is UTC, and a bare date is its beginning."""
    if not (text := _text(fields, name)):
        return None
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidInput(name, f"must be an RFC 3339 time, such as {EXAMPLE_TIME}, got {shown(text)}") from None


def _flag(fields: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidInput(name, f"must be true or false, got {shown(value)}")
    return value
