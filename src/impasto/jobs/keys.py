"""API keys: made, listed, limited, revoked and recognised; and the secrets that sign their webhooks.

Knows keys only long enough to hash them; a webhook's secret is kept as it is, because it signs. Knows the words for
what a key may do. Knows nothing of HTTP headers or of which route needs which word (``api/auth.py``).
"""

from __future__ import annotations

import base64
import enum
import hashlib
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from impasto.errors import InvalidInput, NotFound, Unauthorized
from impasto.jobs.database import reading, writing
from impasto.jobs.limits import AS_SET, KeyLimits
from impasto.jobs.queries import queries
from impasto.jobs.records import moment

PREFIX_CHARS: Final = 6  # of the secret, kept in clear to tell keys apart
MAX_NAME_CHARS: Final = 100
WEBHOOK_PREFIX: Final = "whsec_"
LONGEST_LIFE: Final = 100 * 365 * 86400.0  # seconds
_NO_KEY: Final = "no key in use has this name or id; list the keys to see them"


class Scope(enum.StrEnum):
    """What a key may do; the value is what the database holds."""

    GENERATE = "generate"
    """Submit, upload, cancel and delete."""

    READ = "read"
    """Read, follow and list its own predictions."""

    METRICS = "metrics"
    """Read ``/metrics``, where that needs a key."""


ALL_SCOPES: Final = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it may be shown: everything but the secret."""

    id: str
    name: str
    prefix: str  # first characters of the secret
    created_at: datetime  # UTC
    disabled_at: datetime | None  # UTC; set once revoked
    expires_at: datetime | None = None  # UTC
    expired: bool = False  # by the database's clock, when this was read
    scopes: frozenset[Scope] = ALL_SCOPES
    limits: KeyLimits = AS_SET

    @classmethod
    def from_row(cls, row: Mapping[Any, Any]) -> Key:
        """Build a key from a row of ``keys``."""
        return cls(
            id=row["id"],
            name=row["name"],
            prefix=row["prefix"],
            created_at=moment(row["created_at"]),
            disabled_at=None if row["disabled_at"] is None else moment(row["disabled_at"]),
            expires_at=None if row["expires_at"] is None else moment(row["expires_at"]),
            expired=bool(row["expired"]),
            scopes=frozenset(map(Scope, row["scopes"].split())),
            limits=KeyLimits.from_row(row),
        )


class KeyStore:
    """The keys of one database. Every method raises ``Unavailable`` when the database cannot answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = queries(engine.dialect.name)

    def create(
        self,
        name: str,
        *,
        scopes: Collection[Scope] = ALL_SCOPES,
        lifetime: float | None = None,
        limits: KeyLimits = AS_SET,
    ) -> str:
        """Make a key and return its secret, 64 hexadecimal digits; it cannot be shown again.

        Args:
            name: For people.
            scopes: What it may do.
            lifetime: Seconds from now until it works no more; without them it works until it is revoked.
            limits: How much.

        Raises:
            InvalidInput: The name is empty, too long, not printable, or that of another key in use; the lifetime is
                not positive or over a hundred years; or there is no scope.
        """
        if not (name.strip() and name.isprintable() and len(name) <= MAX_NAME_CHARS):
            raise InvalidInput("name", f"must be 1 to {MAX_NAME_CHARS} printable characters")
        if lifetime is not None and not 0 < lifetime <= LONGEST_LIFE:
            raise InvalidInput("lifetime", "must be over 0 and at most a hundred years")
        if not scopes:
            raise InvalidInput("scopes", f"must have one of {', '.join(Scope)}")
        secret = secrets.token_hex(32)
        values = {
            "id": secrets.token_hex(8),
            "name": name,
            "prefix": secret[:PREFIX_CHARS],
            "secret_hash": _hash(secret),
            "lifetime": None if lifetime is None else round(lifetime * 1000),
            "scopes": " ".join(scope for scope in Scope if scope in scopes),
            **limits.to_row(),
        }
        try:
            with writing(self._engine) as db:
                db.execute(self._queries["create_key"], values)
        except IntegrityError:
            raise InvalidInput("name", f"{name!r} is taken; choose another or revoke that key first") from None
        return secret

    def limit(self, name_or_id: str, **changes: Any) -> Key:
        """Change some of a key's limits, from its next request on; ``changes`` are fields of ``KeyLimits``.

        Raises:
            NotFound: No key in use has this name or id.
            InvalidInput: As ``KeyLimits``.
        """
        with writing(self._engine) as db:
            row = db.execute(self._queries["find_usable_key"], {"name_or_id": name_or_id}).mappings().first()
            if row is None:
                raise NotFound(_NO_KEY)
            key = Key.from_row(row)
            values = {"id": key.id, **replace(key.limits, **changes).to_row()}
            return Key.from_row(db.execute(self._queries["set_limits"], values).mappings().one())

    def list(self) -> tuple[Key, ...]:
        """Return all keys, the oldest first, revoked ones too."""
        with reading(self._engine) as db:
            return tuple(Key.from_row(row) for row in db.execute(self._queries["list_keys"]).mappings())

    def revoke(self, name_or_id: str) -> Key:
        """Shut a key off for good, at once; its jobs go on.

        Raises:
            NotFound: No key in use has this name or id.
        """
        with writing(self._engine) as db:
            row = db.execute(self._queries["revoke_key"], {"name_or_id": name_or_id}).mappings().first()
        if row is None:
            raise NotFound(_NO_KEY)
        return Key.from_row(row)

    def webhook_secret(self, key_id: str) -> str:
        """Return what signs a key's webhooks, ``whsec_…``; made when it is first asked for, and the same ever after.

        Raises:
            NotFound: There is no such key.
        """
        with reading(self._engine) as db:
            secret = db.execute(self._queries["webhook_secret"], {"id": key_id}).scalar()
        if secret is None:
            with writing(self._engine) as db:
                values = {"id": key_id, "secret": _new_webhook_secret()}
                secret = db.execute(self._queries["keep_webhook_secret"], values).scalar()
        if secret is None:
            raise NotFound(_NO_KEY)
        return str(secret)

    def named_webhook_secret(self, name_or_id: str, *, rotate: bool = False) -> str:
        """Return the same for a key in use, by name or id; ``rotate`` draws another, which signs from now on.

        Raises:
            NotFound: No key in use has this name or id.
        """
        values = {"name_or_id": name_or_id, "secret": _new_webhook_secret()}
        if rotate:
            with writing(self._engine) as db:
                secret = db.execute(self._queries["rotate_webhook_secret"], values).scalar()
        else:
            with reading(self._engine) as db:
                row = db.execute(self._queries["find_usable_key"], {"name_or_id": name_or_id}).mappings().first()
            secret = None if row is None else self.webhook_secret(row["id"])
        if secret is None:
            raise NotFound(_NO_KEY)
        return str(secret)

    def authenticate(self, secret: str) -> Key:
        """Return the key that ``secret`` (spaces around it ignored) belongs to.

        It is looked up by its hash: how long that takes tells nothing of any secret, only of hashes, and nobody can
        choose those.

        Raises:
            Unauthorized: It is empty, unknown, revoked or expired.
        """
        secret = secret.strip()
        if not secret:
            raise Unauthorized("no API key was sent; send the header 'Authorization: Bearer <key>'")
        with reading(self._engine) as db:
            row = db.execute(self._queries["find_key"], {"secret_hash": _hash(secret)}).mappings().first()
        if row is None:
            raise Unauthorized("this API key is not known; check that it was copied whole")
        if row["disabled_at"] is not None:
            raise Unauthorized("this API key was revoked; use another")
        if row["expired"]:
            raise Unauthorized("this API key has expired; use another")
        return Key.from_row(row)

    def any(self) -> bool:
        """Tell whether some key was made and not revoked."""
        with reading(self._engine) as db:
            return db.execute(self._queries["any_key"]).first() is not None


def _new_webhook_secret() -> str:
    """Draw 256 bits, in a form that is a key as text (``v3``) and as base64 (Standard Webhooks)."""
    return WEBHOOK_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode("ascii")


def _hash(secret: str) -> str:
    """Hash a secret for look-up. It is 256 random bits, so a slow password hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
