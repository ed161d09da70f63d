"""What tools ask of an account: balance, bills, usage. A server of one's own bills nothing, and says so in their form.

Knows the forms. The counts of usage are true (``jobs/usage.py``); every amount is zero and no bill exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field

from impasto.api.auth import CallerDep
from impasto.api.body import parse_object, read_body
from impasto.api.fields import Integer, Text, shown
from impasto.api.models import VERSIONS, find_served
from impasto.api.schemas import Success, Wire, responses
from impasto.api.service import Service, ServiceDep
from impasto.api.view import enveloped
from impasto.errors import InvalidInput
from impasto.jobs.states import Status
from impasto.jobs.usage import UsageCounter, Used
from impasto.types import Bounds

BALANCES: Final = ("balance", "account/balance", "billing/balance")  # all spellings in use
USAGE_DAYS: Final = 31  # counted where the request names no time
_PAGE: Final = Integer("page", "From 1.", Bounds(1, 1_000_000, 1), slider=False)
_PAGE_SIZE: Final = Integer("page_size", "Items on a page.", Bounds(1, 1000, 20), slider=False)
_TIME: Final = "ISO 8601, such as 2026-01-31T00:00:00Z or 2026-01-31."
_MODEL: Final = Text("model_uuid", "Count this model alone.", max_chars=200)


class Balance(Wire):
    """Nothing is prepaid and nothing is owed."""

    balance: float = Field(default=0, description="Always 0: nothing is billed, and requests do not depend on it.")
    currency: str = "USD"


class Bills(Wire):
    """A page of bills, of which there are none."""

    page: int
    page_size: int
    total: int = 0
    items: list[dict[str, Any]] = Field(default=[], description="Always empty.")


class ModelUsage(Wire):
    """Predictions of one model."""

    model_uuid: str
    model_type: str
    unit_price: float = 0
    total_cost: float = 0
    total_count: int
    last_used_date: str


class DayModelUsage(Wire):
    """Predictions of one model on one day."""

    model_uuid: str
    amount: float = 0
    count: int


class DayUsage(Wire):
    """Predictions of one day, in UTC."""

    date: str
    amount: float = 0
    count: int
    models: list[DayModelUsage]


class UsageSummary(Wire):
    """All of them."""

    total_cost: float = 0
    total_requests: int
    success_requests: int = Field(description="Those that are completed.")


class Usage(Wire):
    """The key's predictions that are still kept, counted."""

    per_model_usage: list[ModelUsage]
    daily_usage: list[DayUsage]
    summary: UsageSummary


def balance(key: CallerDep) -> Response:
    """Say that there is nothing to pay; tools call this to try a key."""
    return enveloped(Success[Balance](data=Balance(balance=0)))


async def bills(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Return a page without bills."""
    body = await _optional_body(request, service)
    page, size = (_whole(field, body) for field in (_PAGE, _PAGE_SIZE))
    return enveloped(Success[Bills](data=Bills(page=page, page_size=size)))


async def usage(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Count the key's predictions by model and day."""
    body = await _optional_body(request, service)
    until = _time(body, ("end_time", "end_date"), datetime.now(UTC), end=True)
    since = _time(body, ("start_time", "start_date"), until - timedelta(days=USAGE_DAYS))
    asked = "" if body.get(_MODEL.name) is None else _MODEL.read(body[_MODEL.name], _MODEL.name)
    used = await run_in_threadpool(UsageCounter(service.store.engine).used, key.id, since, until)
    served = find_served(asked)
    wanted = served.id if served else asked
    return enveloped(Success[Usage](data=_counted([part for part in used if wanted in ("", part.model)])))


def _counted(used: Iterable[Used]) -> Usage:
    """Add up by model, by day, and all."""
    models: Counter[str] = Counter()
    days: dict[str, Counter[str]] = {}
    statuses: Counter[Status] = Counter()
    last: dict[str, str] = {}
    for part in used:
        day = part.day.isoformat()
        models[part.model] += part.count
        days.setdefault(day, Counter())[part.model] += part.count
        statuses[part.status] += part.count
        last[part.model] = max(day, last.get(part.model, day))
    return Usage(
        per_model_usage=[
            ModelUsage(model_uuid=name, model_type=_type(name), total_count=count, last_used_date=last[name])
            for name, count in models.most_common()
        ],
        daily_usage=[
            DayUsage(
                date=day,
                count=counts.total(),
                models=[DayModelUsage(model_uuid=name, count=count) for name, count in counts.most_common()],
            )
            for day, counts in sorted(days.items())
        ],
        summary=UsageSummary(total_requests=statuses.total(), success_requests=statuses[Status.COMPLETED]),
    )


def _type(model: str) -> str:
    served = find_served(model)
    return served.type if served else "text-to-image"


async def _optional_body(request: Request, service: Service) -> dict[str, Any]:
    """Return the body's object; no body is an empty one."""
    body = await read_body(request, service.settings.max_body_bytes)
    return parse_object(body, request.headers.get("content-type", "")) if body.strip() else {}


def _whole(field: Integer, body: dict[str, Any]) -> int:
    value = body.get(field.name)
    return int(field.bounds.default) if value is None else field.read(value, field.name)


def _time(body: dict[str, Any], names: tuple[str, ...], default: datetime, *, end: bool = False) -> datetime:
    """Read a moment under one of its names; a bare date is its beginning, or its end for the ``end`` of a time."""
    for name in names:
        text = body.get(name)
        if text is None or text == "":
            continue
        try:
            when = datetime.fromisoformat(text)
            if end and len(text) == len("2026-01-31"):
                when += timedelta(days=1, milliseconds=-1)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            when.astimezone(UTC)
        except (TypeError, ValueError, OverflowError):
            raise InvalidInput(name, f"must be a time in {_TIME} Got {shown(text)}") from None
        return when
    return default


def router() -> APIRouter:
    """Return the routes, in both versions and all spellings."""
    routes = APIRouter(tags=["account"])
    for version in VERSIONS:
        for name in BALANCES:
            routes.add_api_route(
                f"/api/{version}/{name}",
                balance,
                methods=["GET"],
                summary="The balance: always 0",
                operation_id=f"{name.replace('/', '_')}_{version}",
                response_model=Success[Balance],
                responses=responses(401),
            )
        page = {field.name: field.schema() for field in (_PAGE, _PAGE_SIZE)}
        times = {name: {"type": "string", "description": _TIME} for name in ("start_time", "end_time")}
        for path, endpoint, answer, properties in (
            ("billings/search", bills, Success[Bills], page),
            ("user/usage_stats", usage, Success[Usage], times | {_MODEL.name: _MODEL.schema()}),
        ):
            schema = {"type": "object", "properties": properties}
            routes.add_api_route(
                f"/api/{version}/{path}",
                endpoint,
                methods=["POST"],
                summary="Bills: none" if endpoint is bills else "Predictions counted by model and day",
                operation_id=f"{path.replace('/', '_')}_{version}",
                response_model=answer,
                responses=responses(400, 401, 413),
                openapi_extra={"requestBody": {"content": {"application/json": {"schema": schema}}}},
            )
    return routes
