"""The list of models and what they cost: ``GET /models``, ``POST /model/pricing`` and ``/model/price``.

Knows the form in which command-line tools, agents and form builders read a model. The models themselves are in
``models.py``. Every price is zero: a server of one's own bills nothing.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from impasto.api.auth import CallerDep
from impasto.api.body import parse_object, read_body
from impasto.api.fields import Text
from impasto.api.models import MODELS, VERSIONS, ServedModel, find_served
from impasto.api.schemas import Success, Wire, responses
from impasto.api.service import ServiceDep
from impasto.api.view import Links, enveloped
from impasto.errors import InvalidInput, NotFound

FORMULA: Final = '{"total_price": base_price * num_images}'  # JSONata over the inputs, as tools evaluate it
VIDEO_FORMULA: Final = '{"total_price": base_price}'
CURRENCY: Final = "USD"
_MODEL_ID: Final = Text("model_id", "One of the models.", min_chars=1, max_chars=200)


class RunSchema(Wire):
    """How a model is called."""

    type: str = Field(default="model_run", description="Always the same.")
    method: str = "POST"
    server: str = Field(description="On the host that was called.")
    api_path: str
    request_schema: dict[str, Any] = Field(description="JSON Schema of the body, with hints for forms.")


class ApiSchemas(Wire):
    """The ways to call a model: one."""

    api_schemas: list[RunSchema]


class ListedModel(Wire):
    """One model, as tools list it."""

    model_id: str
    name: str
    description: str
    type: str = Field(description="text-to-image, which may take a start picture, image-to-image or image-to-video.")
    base_price: float
    formula: str
    sort_order: int
    api_schema: ApiSchemas


class UnitPrice(Wire):
    """What one call costs: nothing."""

    model_id: str
    unit_price: float = 0
    currency: str = CURRENCY


class Price(Wire):
    """What one call costs, the other way to say it."""

    model_id: str
    price: float = 0
    discounted_price: float = 0
    discount_rate: float = 0
    currency: str = CURRENCY


def models(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Return every model that can be posted to, with the form of its body."""
    links = Links.of(request, service)
    return enveloped(Success[list[ListedModel]](data=[_listed(model, at, links) for at, model in enumerate(MODELS, 1)]))


def _listed(model: ServedModel, position: int, links: Links) -> ListedModel:
    path = f"/api/{links.version}/{model.id}"
    run = RunSchema(server=links.base, api_path=path, request_schema=model.schema())
    return ListedModel(
        model_id=model.id,
        name=model.id,
        description=model.description,
        type=model.type,
        base_price=model.base_price,
        formula=VIDEO_FORMULA if model.type == "image-to-video" else FORMULA,
        sort_order=position,
        api_schema=ApiSchemas(api_schemas=[run]),
    )


async def pricing(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Say what a call costs, whatever its inputs."""
    model = await _asked(request, service.settings.max_body_bytes)
    return enveloped(Success[UnitPrice](data=UnitPrice(model_id=model.id, unit_price=model.base_price)))


async def price(request: Request, service: ServiceDep, key: CallerDep) -> Response:
    """Say the same in the newer form."""
    model = await _asked(request, service.settings.max_body_bytes)
    free = Price(model_id=model.id, price=model.base_price, discounted_price=model.base_price)
    return enveloped(Success[Price](data=free))


async def _asked(request: Request, limit: int) -> ServedModel:
    """Return the model that the body names."""
    body = parse_object(await read_body(request, limit), request.headers.get("content-type", ""))
    if body.get("model_id") is None:
        raise InvalidInput("model_id", 'property "model_id" is missing')
    name = _MODEL_ID.read(body["model_id"], "model_id")
    model = find_served(name)
    if model is None:
        raise NotFound(f"no model {name[:100]!r} here; there are: {', '.join(served.id for served in MODELS)}")
    return model


def router() -> APIRouter:
    """Return the routes, in both versions."""
    routes = APIRouter(tags=["models"])
    asked = {
        "type": "object",
        "required": ["model_id"],
        "properties": {_MODEL_ID.name: _MODEL_ID.schema(), "inputs": {"type": "object"}},
    }
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": asked}}}}
    for version in VERSIONS:
        routes.add_api_route(
            f"/api/{version}/models",
            models,
            methods=["GET"],
            summary="List the models",
            operation_id=f"models_{version}",
            response_model=Success[list[ListedModel]],
            responses=responses(401),
        )
        for name, endpoint, answer in (("pricing", pricing, Success[UnitPrice]), ("price", price, Success[Price])):
            routes.add_api_route(
                f"/api/{version}/model/{name}",
                endpoint,
                methods=["POST"],
                summary="What a call costs",
                operation_id=f"model_{name}_{version}",
                response_model=answer,
                responses=responses(400, 401, 404, 413),
                openapi_extra=body,
            )
    return routes
