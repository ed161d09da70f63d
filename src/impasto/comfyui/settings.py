"""Which Impasto server the nodes talk to, and with which key.

Knows the environment and ComfyUI's user settings. Knows no workflows: neither address nor key is ever a widget, so
neither is saved with a workflow or a picture, and no workflow can send the key anywhere. Imports nothing of ComfyUI.

Whoever starts ComfyUI says with variables which hosts there are; settings that a browser can write choose among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from impasto.client import LOOPBACK, read_url
from impasto.errors import ConfigError

URL_VARIABLE: Final = "IMPASTO_SERVER_URL"
KEY_VARIABLE: Final = "IMPASTO_API_KEY"
HOSTS_VARIABLE: Final = "IMPASTO_SERVER_HOSTS"  # more hosts that user settings may name, with commas between
URL_SETTING: Final = "Impasto.ServerURL"
KEY_SETTING: Final = "Impasto.APIKey"
DEFAULT_URL: Final = "http://127.0.0.1:8000"
USER_SETTINGS: Final = Path("default", "comfy.settings.json")  # below ComfyUI's user folder, of its one user
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Connection:
    """A server that may be asked, and the key for it."""

    url: str
    key: str = field(repr=False)
    key_source: str  # in words, for errors


def find_connection(user: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Connection:
    """Return the server to ask; what the environment says goes before what the user's settings say.

    Args:
        user: ComfyUI's user settings.
        environment: Variables.

    Raises:
        ConfigError: There is no key, or the address is of a host that is not allowed.
    """
    url = environment.get(URL_VARIABLE) or _text(user, URL_SETTING) or DEFAULT_URL
    _check_host(url, allowed_hosts(environment))
    if key := environment.get(KEY_VARIABLE, "").strip():
        return Connection(url, key, f"the variable {KEY_VARIABLE}")
    if key := _text(user, KEY_SETTING):
        return Connection(url, key, "ComfyUI's settings")
    raise ConfigError(
        f"there is no API key for the Impasto server at {url}: make one with `impasto keys create comfyui`, then set "
        f"{KEY_VARIABLE} before starting ComfyUI, or give it in ComfyUI's Settings under Impasto"
    )


def allowed_hosts(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return the hosts that the key may be sent to, as ``host`` or ``host:port``: this machine, and the admin's."""
    named = environment.get(HOSTS_VARIABLE, "").split(",")
    hosts = {host.strip().lower() for host in named if host.strip()}
    if url := environment.get(URL_VARIABLE):
        hosts.add(_host_and_port(url)[1])
    return LOOPBACK | hosts


def read_user_settings(folder: Path) -> Mapping[str, Any]:
    """Return ComfyUI's user settings from its user folder; a file that is not there, or broken, says nothing.

    With ``--multi-user`` a node cannot know whose prompt it runs, so nobody's settings but the default user's are read.
    """
    try:
        settings = json.loads((folder / USER_SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _check_host(url: str, allowed: frozenset[str]) -> None:
    host, with_port = _host_and_port(url)
    if not {host, with_port} & allowed:
        raise ConfigError(
            f"the Impasto server's host {host} is not one that this ComfyUI may send its key to: whoever starts "
            f"ComfyUI can allow it with {HOSTS_VARIABLE}={host}, or name the server in {URL_VARIABLE}"
        )


def _host_and_port(url: str) -> tuple[str, str]:
    address = read_url(url)
    return address.host, f"{address.host}:{address.port or _PORTS[address.scheme]}"


def _text(user: Mapping[str, Any], name: str) -> str:
    value = user.get(name)
    return value.strip() if isinstance(value, str) else ""
