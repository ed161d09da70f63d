"""Webhooks, from the side of whoever asks for one: the address in a request, and ``GET …/webhook/secret``.

Knows where an address may stand in a request, and what is refused at once. Knows nothing of how one is sent
(``delivery.py``) or of when a job has ended (``jobs/webhooks.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final
from urllib.parse import parse_qs

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from impasto.api.auth import CallerDep
from impasto.api.fields import shown
from impasto.api.models import VERSIONS
from impasto.api.schemas import responses
from impasto.api.service import Service, ServiceDep
from impasto.api.view import Links
from impasto.errors import InvalidInput
from impasto.fetch.failure import FetchFailed
from impasto.jobs.records import NewJob

# The hosted service's own words, which stand alone in both keys of the error body.
NO_BASE64: Final = "webhook callback does not support base64 output, please use the normal API to use base64 output"
QUERY_PARAMETER: Final = {
    "name": "webhook",
    "in": "query",
    "required": False,
    "description": "Address that the prediction is posted to when it has ended; also `webhook_url` in the body.",
    "schema": {"type": "string", "format": "uri"},
}
BODY_KEYS: Final = ("webhook_url", "webhook")
_UNESCAPED: Final = re.compile(r"(?:^|&)webhook=(https?://[^&?]*\?.*)$")


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where to tell of a job's end, and on which host the submitter reads it.

    Attributes:
        url: As it is dialled.
        links: The base of the addresses in the event: there is no request to take it from when it is sent.
    """

    url: str
    links: Links

    @classmethod
    def read(cls, query: str, body: Mapping[str, Any], links: Links, service: Service) -> Webhook | None:
        """Return what a submit asks for, or ``None``.

        Args:
            query: The raw query string; ``webhook`` in it wins over the body.
            body: The request's JSON object.
            links: On the host that the submitter called.
            service: Has the policy.

        Raises:
            InvalidInput: The address is none, or nothing is sent there.
        """
        field, text = _address(query, body)
        if not text:
            return None
        if service.poster is None:
            raise InvalidInput(field, "asks for a call to another host, and this server makes none: poll urls.get")
        try:
            return cls(service.poster.check(text), links)
        except FetchFailed as failure:
            raise InvalidInput(field, f"is an address that {failure}") from None

    def on(self, job: NewJob) -> NewJob:
        """Return the job with this webhook."""
        return replace(job, webhook_url=self.url, input={**job.input, "webhook": asdict(self.links)})


def _address(query: str, body: Mapping[str, Any]) -> tuple[str, str]:
    """Return which key names an address, and the address; empty if none does."""
    if text := _in_query(query):
        return "webhook", text
    for key in BODY_KEYS:
        value = body.get(key)
        if value is not None and not isinstance(value, str):
            raise InvalidInput(key, f"must be a string, got {shown(value)}")
        if value and value.strip():
            return key, value.strip()
    return "", ""


def _in_query(query: str) -> str:
    """Read ``webhook=…``; one client appends the address as it is, so that its own query would be taken for ours."""
    if match := _UNESCAPED.search(query):
        return match[1]
    return parse_qs(query, errors="replace").get("webhook", [""])[0].strip()


class Secret(BaseModel):
    """What signs a key's webhooks."""

    secret: str = Field(pattern="^whsec_", description="Keep it to yourself; the same at every call.")


class SecretEnvelope(BaseModel):
    """A success, as everywhere."""

    code: int = 200
    message: str = "success"
    data: Secret


def secret(service: ServiceDep, key: CallerDep) -> Response:
    """Return the key's webhook secret, made at the first call."""
    body = SecretEnvelope(data=Secret(secret=service.keys.webhook_secret(key.id)))
    return JSONResponse(body.model_dump(), headers={"Cache-Control": "no-store"})


def router() -> APIRouter:
    """Return the route, in both versions."""
    routes = APIRouter(tags=["webhooks"])
    for version in VERSIONS:
        routes.add_api_route(
            f"/api/{version}/webhook/secret",
            secret,
            methods=["GET"],
            summary="The secret that signs this key's webhooks",
            operation_id=f"webhook_secret_{version}",
            response_model=SecretEnvelope,
            responses=responses(401),
        )
    return routes
