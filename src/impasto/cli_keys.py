"""The command line's ``impasto keys …``: API keys, what each may do and how much of it.

Knows options and how a table looks in a terminal. Holds no logic of keys (``jobs/keys.py``).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from impasto.errors import InvalidInput

if TYPE_CHECKING:
    from impasto.jobs.keys import Key, KeyStore
    from impasto.jobs.limits import KeyLimits

AS_SET: Final = "default"  # what the settings say
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}  # seconds

keys_app = typer.Typer(help="API keys: make, list, limit, revoke.", no_args_is_help=True, rich_markup_mode="markdown")

Name = Annotated[str, typer.Argument(help="Name or id of the key.", show_default=False)]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the service. (IMPASTO_DATA_DIR)")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database-url", help="Its job store, if elsewhere. (IMPASTO_DATABASE_URL)")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings. (IMPASTO_CONFIG)")]
_OR_AS_SET: Final = f"0: no limit; {AS_SET}: what the settings say."
Rate = Annotated[str | None, typer.Option("--rate", help=f"Submits and uploads a minute. {_OR_AS_SET}")]
Running = Annotated[str | None, typer.Option("--running", help=f"Jobs that run at once. {_OR_AS_SET}")]
Queued = Annotated[str | None, typer.Option("--queued", help=f"Jobs that wait. {_OR_AS_SET}")]
Daily = Annotated[str | None, typer.Option("--daily", help=f"Default pictures' worth a day (UTC). {_OR_AS_SET}")]
Weight = Annotated[
    float | None, typer.Option("--weight", help="Share of the workers beside other keys; 2 is twice that of 1.")
]


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What to call it, such as the app that will use it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="generate, read or metrics; repeatable. Not given: all of them."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="How long it works: 30d, 12h, 90m, 2w. Not given: until revoked.")
    ] = None,
    rate: Rate = None,
    running: Running = None,
    queued: Queued = None,
    daily: Daily = None,
    weight: Weight = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Make a key and print it, alone, on standard output. It is stored hashed and cannot be shown again.

    Examples:

        impasto keys create phone

        impasto keys create guest --expires 7d --rate 10 --daily 100

        impasto keys create dashboard --scope read --scope metrics
    """
    from impasto.jobs.keys import ALL_SCOPES
    from impasto.jobs.limits import KeyLimits

    made = _store(data_dir, database_url, config).create(
        name,
        scopes=_scopes(scope) if scope else ALL_SCOPES,
        lifetime=None if expires is None else _seconds(expires),
        limits=KeyLimits(**_limits(rate, running, queued, daily, weight)),
    )
    print(made)


@keys_app.command("list")
def show(data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """List the keys: id, name, first characters, when made, state, scopes, and limits of their own."""
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "name", "key", "created", "state", "scopes", "limits")
    for key in _store(data_dir, database_url, config).list():
        scopes = " ".join(sorted(key.scopes))
        made = f"{key.created_at:%Y-%m-%d %H:%M}"
        table.add_row(key.id, key.name, f"{key.prefix}…", made, _state(key), scopes, _shown(key.limits))
    Console().print(table)


@keys_app.command("limit")
def limit(
    name: Name,
    rate: Rate = None,
    running: Running = None,
    queued: Queued = None,
    daily: Daily = None,
    weight: Weight = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Change how much a key may do, from its next request on; what is not given stays.

    Examples:

        impasto keys limit phone --rate 60 --running 2

        impasto keys limit phone --daily default --weight 3
    """
    changes = _limits(rate, running, queued, daily, weight)
    if not changes:
        raise InvalidInput("keys limit", "needs something to change, such as --rate 60")
    key = _store(data_dir, database_url, config).limit(name, **changes)
    print(f"{key.name} ({key.id}): {_shown(key.limits) or 'as the settings say'}", file=sys.stderr)


@keys_app.command("revoke")
def revoke(name: Name, data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Make a key useless from now on; its jobs go on."""
    key = _store(data_dir, database_url, config).revoke(name)
    print(f"revoked {key.name} ({key.id})", file=sys.stderr)


@keys_app.command("webhook-secret")
def webhook_secret(
    name: Name,
    rotate: Annotated[bool, typer.Option("--rotate", help="Make another, which signs from now on.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Print what signs a key's webhooks, alone, on standard output."""
    print(_store(data_dir, database_url, config).named_webhook_secret(name, rotate=rotate))


def _store(data_dir: Path | None, database_url: str | None, config: Path | None) -> KeyStore:
    from impasto.config import Settings
    from impasto.jobs.database import open_database, upgrade
    from impasto.jobs.keys import KeyStore

    database = open_database(Settings.load(config, {"data_dir": data_dir, "database_url": database_url}).database)
    upgrade(database)
    return KeyStore(database)


def _scopes(names: list[str]) -> list[Any]:
    from impasto.jobs.keys import Scope

    for name in names:
        if name not in set(Scope):
            raise InvalidInput("--scope", f"must be one of {', '.join(Scope)}, got {name!r}")
    return [Scope(name) for name in names]


def _seconds(text: str) -> float:
    """Read ``30d``."""
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text.strip())
    if match is None:
        raise InvalidInput("--expires", f"must be a number and s, m, h, d or w, such as 30d; got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _limits(
    rate: str | None, running: str | None, queued: str | None, daily: str | None, weight: float | None
) -> dict[str, Any]:
    """Return the limits that were given, as ``KeyLimits`` has them."""
    texts = {"rate": rate, "running": running, "queued": queued, "daily": daily}
    given = {name: _limit(name, text) for name, text in texts.items() if text is not None}
    return given if weight is None else {**given, "weight": weight}


def _limit(name: str, text: str) -> float | None:
    if text == AS_SET:
        return None
    try:
        return float(text) if name == "daily" else int(text)
    except ValueError:
        raise InvalidInput(f"--{name}", f"must be a number or {AS_SET}, got {text!r}") from None


def _state(key: Key) -> str:
    if key.disabled_at:
        return "revoked"
    if key.expired:
        return "expired"
    return f"until {key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "active"


def _shown(limits: KeyLimits) -> str:
    """Return a key's own limits, on one line; empty if it has none."""
    words = {
        "a minute": limits.rate,
        "running": limits.running,
        "queued": limits.queued,
        "pictures a day": limits.daily,
    }
    shown = [f"{f'{value:g}' if value else 'any'} {what}" for what, value in words.items() if value is not None]
    return ", ".join(shown + ([f"weight {limits.weight:g}"] if limits.weight != 1 else []))
