"""Webhooks, from the side of whoever sends them: takes events from the outbox, signs them, posts them, tries again.

Knows signatures, pauses and threads. Knows nothing of who asked (``webhooks.py``) or of what may be dialled
(``fetch/post.py``). At least once: an event is done when its address answered 2xx, and a process that dies while it
sends leaves the event to the next, with the same id.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from standardwebhooks import Webhook as StandardWebhook

from impasto.api.service import Service
from impasto.api.view import Links, prediction
from impasto.config import Settings
from impasto.errors import NotFound, Unavailable
from impasto.fetch.addresses import Policy
from impasto.fetch.allowed import Hosts
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from impasto.fetch.post import Poster
from impasto.jobs.keys import WEBHOOK_PREFIX
from impasto.jobs.records import Job
from impasto.jobs.webhooks import WebhookEvent, WebhookStore

log = logging.getLogger(__name__)

Signatures = Literal["v3", "standard", "both"]

LOOK_SECONDS: Final = 0.2  # between looks into the outbox
PLACES: Final = 8  # events sent at once by one process
POST_SECONDS: Final = 10.0  # for one try, from the name's resolution to the answer's status
LEASE_SECONDS: Final = 3 * POST_SECONDS
GROWTH: Final = 4.0  # of the pause, from try to try
LONGEST_PAUSE: Final = 4 * 3600.0  # seconds
JITTER: Final = 0.2  # share of a pause by which it may be longer or shorter
BROKEN_OFF: Final = 3  # more tries than asked for, where the last ones ended with their process
GONE: Final = 410  # the address says that it wants no more


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how far apart an event is sent.

    Attributes:
        tries: In all.
        pause: Seconds before the second try.
    """

    tries: int = 8
    pause: float = 10.0

    def before(self, attempt: int) -> float | None:
        """Return the seconds between a failed try (from 1) and the next, with jitter; ``None`` after the last."""
        if attempt >= self.tries:
            return None
        # The exponent is bounded: 4.0**600 is no float.
        pause = min(self.pause * GROWTH ** min(attempt - 1, 30), LONGEST_PAUSE)
        return pause * random.uniform(1 - JITTER, 1 + JITTER)


def signature(kind: Signatures, secret: str, event_id: str, moment: int, body: bytes) -> str:
    """Return the header ``webhook-signature``: space-separated, one for each scheme that is asked for.

    ``v3``: hexadecimal HMAC-SHA256 over ``{id}.{timestamp}.{body}``, keyed with the secret's text behind ``whsec_``.
    ``v1``: the same message by Standard Webhooks, base64, keyed with the bytes that the text stands for.
    """
    signed = []
    if kind in ("v3", "both"):
        message = f"{event_id}.{moment}.".encode() + body
        digest = hmac.new(secret.removeprefix(WEBHOOK_PREFIX).encode(), message, hashlib.sha256)
        signed.append(f"v3,{digest.hexdigest()}")
    if kind in ("standard", "both"):
        signed.append(StandardWebhook(secret).sign(event_id, datetime.fromtimestamp(moment, UTC), body.decode()))
    return " ".join(signed)


def event_body(job: Job, service: Service) -> bytes:
    """Return the prediction without an envelope, with ``input``: the request's fields as they were sent."""
    shown = prediction(job, service, Links(**job.input["webhook"]))
    told = shown.model_dump(mode="json", by_alias=True, exclude_none=True) | {"input": job.input["as_sent"]}
    return json.dumps(told).encode()


def poster_of(settings: Settings) -> Poster | None:
    """Return what the settings let webhooks be sent with; ``None`` where nothing may leave this host."""
    if settings.offline:
        return None
    policy = Policy.of(
        settings.webhook_allow,
        allow_http=settings.webhook_http,
        ports=settings.webhook_ports,
        setting="webhook_allow",
        only=Hosts.of(settings.webhook_hosts, "webhook_hosts"),
    )
    return Poster(policy)


class Deliverer:
    """Sends what is in the outbox, on threads of its own; any number of processes may each have one.

    Args:
        service: Makes the events' bodies and has the secrets.
        outbox: Where the events are.
        poster: What they are sent with.
        patience: How often each is tried.
        post_seconds: For one try.
    """

    def __init__(
        self,
        service: Service,
        outbox: WebhookStore,
        poster: Poster,
        patience: Patience,
        post_seconds: float = POST_SECONDS,
    ) -> None:
        self._service = service
        self._outbox = outbox
        self._poster = poster
        self._patience = patience
        self._post_seconds = post_seconds
        self._stopping = threading.Event()
        self._under_way: set[Future[None]] = set()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    @classmethod
    def of(cls, service: Service) -> Deliverer | None:
        """Build the one that the settings describe, for the events of the service's own database."""
        settings = service.settings
        if service.poster is None:
            return None
        patience = Patience(settings.webhook_tries, settings.webhook_pause)
        return cls(service, WebhookStore(service.store.engine), service.poster, patience)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more events and break off those under way; they stay in the outbox."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(self._post_seconds)

    def _run(self) -> None:
        with ThreadPoolExecutor(PLACES, thread_name_prefix="webhook") as pool:
            while not self._stopping.wait(LOOK_SECONDS):
                try:
                    self._take(pool)
                except Unavailable as error:
                    log.warning("webhooks wait: %s", error)

    def _take(self, pool: ThreadPoolExecutor) -> None:
        """Give the events that are due to the free threads."""
        self._under_way = {future for future in self._under_way if not future.done()}
        free = PLACES - len(self._under_way)
        if not free:
            return
        for event in self._outbox.claim(free, LEASE_SECONDS):
            future = pool.submit(self._deliver, event)
            future.add_done_callback(_log_fault)
            self._under_way.add(future)

    def _deliver(self, event: WebhookEvent) -> None:
        """Send one event and write down what came of it."""
        if event.attempt > self._patience.tries + BROKEN_OFF:
            self._outbox.give_up(event, "not delivered: every try broke off")
            return
        try:
            status = self._send(event)
        except NotFound:
            self._outbox.give_up(event, "the prediction is gone")
        except FetchFailed as failure:
            self._failed(event, f"the address {failure}", stopped=failure.reason == "stopped")
        else:
            if 200 <= status < 300:
                self._outbox.delivered(event)
            else:
                self._failed(event, f"the address answered with status {status}", final=status == GONE)

    def _send(self, event: WebhookEvent) -> int:
        job = self._service.store.get(event.prediction_id)
        body = event_body(job, self._service)
        secret = self._service.keys.webhook_secret(job.key_id)
        moment = int(time.time())
        signed = signature(self._service.settings.webhook_signatures, secret, event.id, moment, body)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": event.id,
            "webhook-timestamp": str(moment),
            "webhook-signature": signed,
        }
        return self._poster.post(event.url, body, headers, Clock(self._post_seconds, self._stopping.is_set))

    def _failed(self, event: WebhookEvent, why: str, *, stopped: bool = False, final: bool = False) -> None:
        pause = 0.0 if stopped else self._patience.before(event.attempt)
        if pause is None or final:
            log.warning("webhook %s of %s is given up: %s", event.id, event.prediction_id, why)
            self._outbox.give_up(event, why)
        else:
            self._outbox.retry(event, pause, why)


def _log_fault(future: Future[None]) -> None:
    """Log what nobody expected; the event comes free again when its lease ends."""
    if error := future.exception():
        log.error("a webhook could not be sent", exc_info=error)
