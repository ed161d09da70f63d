"""Taking a request in, for every dialect: from its fields to a job in the store.

Knows what makes two requests the same, where pictures are kept, and the store. Knows nothing of single fields
(``models.py``) or of how a dialect writes its answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

from anyio import to_thread
from fastapi import Request

from impasto.api.body import fingerprint
from impasto.api.hold import HangUp, twin_settled
from impasto.api.limits import storing
from impasto.api.models import ServedModel
from impasto.api.service import Service
from impasto.api.submission import Submission
from impasto.api.webhooks import NO_BASE64, Webhook
from impasto.audit import hashed
from impasto.errors import BadRequest, Unavailable
from impasto.jobs.records import Job, NewJob
from impasto.logs import note
from impasto.models.catalog import motion_adapter

MAX_KEY_CHARS: Final = 255


@dataclass(frozen=True, slots=True)
class Draft:
    """A checked request that is no job yet."""

    submission: Submission
    body_hash: str  # the same for the same model, body and webhook
    idempotency_key: str | None = None
    webhook: Webhook | None = None

    @classmethod
    def read(
        cls,
        model: ServedModel,
        fields: Mapping[str, Any],
        service: Service,
        idempotency_key: str | None = None,
        webhook: Webhook | None = None,
    ) -> Draft:
        """Check a body; in a thread, because pictures in it are decoded.

        Raises:
            InvalidInput: As ``Submission.read``.
            BadRequest: A webhook was asked for, and base64, which it does not carry.
        """
        settings = service.settings
        videos = motion_adapter(settings.motion_adapter, settings.model) is not None
        submission = Submission.read(model, fields, refiner=settings.refiner is not None, videos=videos)
        if webhook and submission.values["enable_base64_output"]:
            raise BadRequest(NO_BASE64)
        same = fingerprint(model.id, fields, webhook.url if webhook else None)
        return cls(submission, same, idempotency_key, webhook)

    @property
    def sync(self) -> bool:
        """Whether the client waits for the job's end."""
        return self.submission.sync

    @property
    def lora_names(self) -> list[str]:
        """The LoRAs it asks for, as it names them."""
        return [lora.path for lora in self.submission.to_request().loras]

    def to_job(self, key_id: str, pictures: Mapping[str, str]) -> NewJob:
        """Return the row for the store."""
        job = self.submission.to_job(key_id, pictures)
        return replace(
            self.webhook.on(job) if self.webhook else job,
            idempotency_key=self.idempotency_key,
            body_hash=self.body_hash,
            held=self.sync,
        )


def idempotency_key(request: Request) -> str | None:
    """Return the header ``Idempotency-Key``; a blank one is none.

    Raises:
        BadRequest: It is too long, or not printable ASCII.
    """
    text = request.headers.get("idempotency-key", "").strip()
    if len(text) > MAX_KEY_CHARS:
        raise BadRequest(f"the header Idempotency-Key has {len(text)} characters; at most {MAX_KEY_CHARS} are taken")
    if not (text.isascii() and text.isprintable()):
        raise BadRequest("the header Idempotency-Key must be printable ASCII characters, such as a UUID")
    return text or None


async def accepted(draft: Draft, service: Service, key_id: str, hang_up: HangUp) -> Job | None:
    """Return the job made from ``draft``, or the one that the same request has made before.

    ``None`` if nobody waits any more for a synchronous request that is no job yet.

    Raises:
        InvalidInput: A picture cannot be fetched.
        Conflict: The idempotency key belongs to another request.
        TooManyRequests: The key is over one of its limits.
        BadRequest: It is more than the key may have in a whole day.
        Unavailable: The server has no room, or its database is away; nothing was kept.
    """
    service.disk.check()
    pictures = await service.pictures.fetched(draft.submission.pictures)
    if draft.sync:
        await twin_settled(service, key_id, draft.body_hash)
        if hang_up.done():
            return None
    return await to_thread.run_sync(_create, draft, pictures, key_id, service, limiter=service.writers)


def _create(draft: Draft, pictures: Mapping[str, bytes], key_id: str, service: Service) -> Job:
    """Store the pictures and make the job.

    The files are there before the row that names them, and go again if no row comes to name them.
    """
    stored: dict[str, str] = {}
    with ExitStack() as undo, storing():
        for name, png in pictures.items():
            stored[name] = service.outputs.put_input(png)
            undo.callback(service.outputs.delete, [stored[name]])
        new = draft.to_job(key_id, stored)
        try:
            job = service.store.create(new, service.settings.max_queued, service.limits)
        except Unavailable:  # it may have come into the store all the same, and a sweep knows whether it did
            undo.pop_all()
            raise
        if job.input.get("pictures") == stored:
            undo.pop_all()
    note(prediction_id=job.id, cost=round(new.cost, 3), loras=hashed(draft.lora_names))
    return job
