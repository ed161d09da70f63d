"""Which addresses may be dialled: public ones, and what the operator allows.

Knows address blocks, hosts, ports and schemes. Dials nothing and resolves nothing.

Source: the IANA special-purpose address registries for IPv4 (RFC 6890) and IPv6, and the transition mechanisms that
carry an IPv4 address inside an IPv6 one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

import httpx

from impasto.errors import ConfigError
from impasto.fetch.allowed import Hosts
from impasto.fetch.failure import FetchFailed

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Origin = tuple[str, str, int]  # scheme, host, port

DEFAULT_PORTS: Final = frozenset({80, 443})
MAX_URL_CHARS: Final = 4096
_HOST: Final = re.compile(rb"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_SCHEME_PORTS: Final = {"http": 80, "https": 443}
_GLOBAL_UNICAST: Final = ip_network("2000::/3")  # all that is handed out of IPv6; the rest is special or not in use
# ``is_global`` differs between Python versions and lets some of these through, so every block stands here.
_DENIED: Final = tuple(
    ip_network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32",
        "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    )
)  # fmt: skip


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet: unicast, global, and not one that carries another inside."""
    address = unwrapped(address)
    if any(address in block for block in _DENIED if block.version == address.version):
        return False
    return address.is_global and (address.version == 4 or address in _GLOBAL_UNICAST)


def unwrapped(address: Address) -> Address:
    """Return the IPv4 address in an IPv4-mapped IPv6 one (``::ffff:127.0.0.1``), else the address itself."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be fetched.

    Attributes:
        hosts: Names that may be dialled whatever they resolve to.
        networks: Blocks that may be dialled by any name.
        origins: Scheme, host and port of the operator's own sites, dialled whatever the rest says.
        allow_http: Whether plain http is fetched, too.
        ports: Ports that are dialled.
        only: The only hosts that are dialled, beside the operator's own sites and where those lead; ``None``: any.
    """

    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    origins: frozenset[Origin] = frozenset()
    allow_http: bool = False
    ports: frozenset[int] = DEFAULT_PORTS
    only: Hosts | None = None

    @classmethod
    def of(
        cls,
        allow: Iterable[str] = (),
        *,
        allow_http: bool = False,
        ports: Iterable[int] = DEFAULT_PORTS,
        endpoints: Iterable[str] = (),
        setting: str = "fetch_allow",
        only: Hosts | None = None,
    ) -> Policy:
        """Read an operator's words: ``allow`` has host names, addresses and blocks; ``endpoints`` are base URLs.

        Raises:
            ConfigError: An entry is none of these; the message names ``setting``.
        """
        hosts, networks = set(), []
        for entry in allow:
            try:
                networks.append(ip_network(entry, strict=False))
            except ValueError:
                hosts.add(_host_name(entry, setting))
        origins = frozenset(origin_of(httpx.URL(endpoint)) for endpoint in endpoints)
        return cls(frozenset(hosts), tuple(networks), origins, allow_http, frozenset(ports), only)

    def read_url(self, text: str, *, from_own_site: bool = False) -> httpx.URL:
        """Parse an address and check what can be checked without a network.

        Args:
            text: As somebody wrote it.
            from_own_site: Whether one of ``origins`` led here, so that ``only`` does not count.

        Raises:
            FetchFailed: Not an address that is fetched here; the message says what would be.
        """
        try:
            url = httpx.URL(text) if len(text) <= MAX_URL_CHARS else None
        except (httpx.InvalidURL, ValueError):
            url = None
        if url is None or not _HOST.fullmatch(url.raw_host):
            raise FetchFailed("address", "is no whole web address: give https://host/path")
        if url.userinfo:
            raise FetchFailed("address", "has a user name in it: give the address without one")
        if origin_of(url) not in self.origins:
            self._check_open(url)
            if self.only is not None and not from_own_site and not self.only.has(url.raw_host.decode("ascii")):
                raise FetchFailed("address", "is not on this server's list of hosts: give another, or ask its operator")
        return url

    def permits(self, host: str, port: int, address: Address) -> bool:
        """Whether ``address``, which ``host`` resolved to, may be dialled."""
        if _plain(host) in self.hosts or any((_plain(host), port) == origin[1:] for origin in self.origins):
            return True
        real = unwrapped(address)
        return is_public(real) or any(real in block for block in self.networks if block.version == real.version)

    def _check_open(self, url: httpx.URL) -> None:
        schemes = ("https", "http") if self.allow_http else ("https",)
        if url.scheme not in schemes:
            raise FetchFailed("address", f"must be {' or '.join(schemes)}, and nothing else is fetched")
        port = origin_of(url)[2]
        if port not in self.ports:
            ports = ", ".join(map(str, sorted(self.ports)))
            raise FetchFailed("address", f"has port {port}, and only {ports} are dialled")


def origin_of(url: httpx.URL) -> Origin:
    """Return scheme, host and port, with the scheme's own port filled in."""
    return url.scheme, _plain(url.raw_host.decode("ascii")), url.port or _SCHEME_PORTS.get(url.scheme, 0)


def parse_address(text: str) -> Address | None:
    """Read a numeric address; ``None`` for anything else."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


def _host_name(entry: str, setting: str) -> str:
    try:
        host = httpx.URL(f"https://{entry}").raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError):
        host = ""
    if not _HOST.fullmatch(host.encode()) or _plain(host) != _plain(
        entry.encode("idna").decode() if not entry.isascii() else entry
    ):
        raise ConfigError(f"settings: {setting}: {entry!r} is neither a host name nor an address or block (10.0.0.0/8)")
    return _plain(host)
