"""The guard: what is not public is not dialled, however it is written, unless the operator allows it."""

import contextlib
import ipaddress
import os
import shutil
import ssl
import subprocess
import threading

import httpx
import pytest

from impasto.errors import ConfigError
from impasto.fetch.addresses import Policy, is_public
from impasto.fetch.client import Client
from impasto.fetch.failure import UNREACHABLE, FetchFailed
from impasto.fetch.guard import Clock, PinnedBackend, resolve
from tests.sites import Page, Web, redirect, running


@pytest.fixture
def web():
    with running(Web()) as server:
        server.pages["/x"] = Page(b"secret of the intranet")
        yield server


class Watched:
    """A resolver that gives prepared answers in turn and counts its calls."""

    def __init__(self, *answers):
        self.answers = answers
        self.calls = 0

    def __call__(self, host, port):
        self.calls += 1
        return self.answers[min(self.calls, len(self.answers)) - 1]


def policy(web, *allow, **options):
    return Policy.of(allow, **{"allow_http": True, "ports": [web.server_port]} | options)


def get(client, url, seconds=5.0):
    with client.open(url, Clock(seconds), max_bytes=1000) as answer:
        return answer.read()


# Every way to write a host that leads to this machine or its surroundings.
LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.1", "017700000001",
    "0177.0.0.1", "localhost", "LOCALHOST", "localhost.", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "127。0。0。1", "①②⑦.⓪.⓪.①",
]  # fmt: skip
ELSEWHERE = [
    "127.0.0.2", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "[fd00:ec2::254]",
    "[fe80::1]", "[fec0::1]", "[::1]",
    "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::a00:1]", "[2002:7f00:1::]", "[2001::1]", "100.64.0.1",
    "198.18.0.1", "192.88.99.1", "224.0.0.1", "[ff02::1]", "255.255.255.255", "240.0.0.1", "192.0.0.8", "[::]",
    "[100::1]", "[2001:db8::1]", "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]", "[4000::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_no_spelling_of_loopback_is_dialled(web, host):
    """Nothing connects; the same spelling reaches the very same server where the operator allows the block."""
    url = f"http://{host}:{web.server_port}/x"
    with pytest.raises(FetchFailed):
        get(Client(policy(web)), url)
    assert web.reached == 0

    allowed = Client(policy(web, "127.0.0.0/8", "0.0.0.0", "::1"))
    try:
        assert get(allowed, url) == b"secret of the intranet"
    except FetchFailed:  # no address, or none that this machine's resolver knows, so it never was a way in
        with contextlib.suppress(httpx.InvalidURL):
            assert resolve(httpx.URL(url).host, web.server_port) == []
    else:
        assert web.reached == 1


def test_most_spellings_do_reach_loopback_when_allowed(web):
    """The control of the controls: if nothing could be reached, the test above would show nothing."""
    client, reached = Client(policy(web, "127.0.0.0/8", "0.0.0.0", "::1")), 0
    for host in LOOPBACK:
        with contextlib.suppress(FetchFailed):
            reached += get(client, f"http://{host}:{web.server_port}/x") == b"secret of the intranet"
    assert reached >= 11


class Recording(PinnedBackend):
    """Remembers what would be dialled, and dials nothing."""

    def __init__(self, policy, resolver=resolve):
        super().__init__(policy, Clock(5), resolver)
        self.dialled = []
        self._dialler = self

    def connect(self, host, port=80):
        return PinnedBackend.connect_tcp(self, host, port)

    def connect_tcp(self, host, port, *rest):
        self.dialled.append(host)
        raise FetchFailed("broken", "recorded")


@pytest.mark.parametrize("host", ELSEWHERE)
def test_no_special_address_is_dialled(host):
    """Private, link-local, metadata, transition and multicast; with the block allowed each would be dialled."""
    number = host.strip("[]")
    guarded = Recording(Policy())
    with pytest.raises(FetchFailed, match="could not be reached"):
        guarded.connect(number)
    assert guarded.dialled == []

    allowed = Recording(Policy.of(["0.0.0.0/0", "::/0"]))
    with pytest.raises(FetchFailed, match="recorded"):
        allowed.connect(number)
    assert len(allowed.dialled) == 1


def test_public_addresses_are_dialled():
    """The control of the whole list: the guard does not simply refuse everything."""
    for number in ("93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:812::200e"):
        backend = Recording(Policy())
        with pytest.raises(FetchFailed, match="recorded"):
            backend.connect(number)
        assert backend.dialled == [number]


@pytest.mark.parametrize("block", ["::ffff:0:0/96", "64:ff9b::/96", "::/96", "2002::/16", "fec0::/10", "224.0.0.0/4"])
def test_blocks_that_the_standard_library_calls_global_are_not_public(block):
    """Every address of them, first to last; an IPv4 address in an IPv6 one counts as itself."""
    network = ipaddress.ip_network(block)
    if block.startswith("::ffff"):
        assert is_public(ipaddress.ip_address("::ffff:1.1.1.1"))
        assert not is_public(ipaddress.ip_address("::ffff:10.1.1.1"))
    else:
        assert not is_public(network[0]) and not is_public(network[-1])


def test_a_name_with_one_private_answer_is_not_dialled():
    """Also when its other answers are public, in either order."""
    for answers in (["1.1.1.1", "127.0.0.1"], ["10.0.0.1", "1.1.1.1"], ["1.1.1.1", "::1"], [], ["nonsense"]):
        backend = Recording(Policy(), Watched(answers))
        with pytest.raises(FetchFailed, match="could not be reached"):
            backend.connect("mixed.example")
        assert backend.dialled == []
    backend = Recording(Policy(), Watched(["1.1.1.1", "2606:4700:4700::1111"]))
    with pytest.raises(FetchFailed, match="recorded"):
        backend.connect("public.example")
    assert backend.dialled == ["1.1.1.1"]


def test_a_name_that_changes_its_answer_gains_nothing(web):
    """The name is resolved once for a connection, and the number that was checked is the number that is dialled."""
    resolver = Watched(["1.1.1.1"], ["127.0.0.1"])
    backend = Recording(Policy(), resolver)
    with pytest.raises(FetchFailed, match="recorded"):
        backend.connect("rebinding.example", 80)
    assert (resolver.calls, backend.dialled) == (1, ["1.1.1.1"])

    second = Recording(Policy(), resolver)
    with pytest.raises(FetchFailed, match="could not be reached"):
        second.connect("rebinding.example", 80)
    assert second.dialled == []

    control = Client(policy(web, "127.0.0.0/8"), resolver=Watched(["127.0.0.1"]))
    assert get(control, f"http://rebinding.example:{web.server_port}/x") == b"secret of the intranet"


def test_each_redirect_is_checked_like_the_first_address(web):
    """A public page that leads inside is followed up to the door; with the inside allowed, through it."""
    with running(Web()) as inside:
        inside.pages["/x"] = Page(b"inner secret")
        web.pages["/go"] = redirect(f"http://inside.example:{inside.server_port}/x")
        hosts = {"outside.example": ["127.0.0.1"], "inside.example": ["127.0.0.2"]}
        ports = [web.server_port, inside.server_port]

        def ask(*allow):
            options = Policy.of(allow, allow_http=True, ports=ports)
            client = Client(options, resolver=lambda host, port: hosts[host])
            return get(client, f"http://outside.example:{web.server_port}/go")

        with pytest.raises(FetchFailed, match="could not be reached"):
            ask("127.0.0.1")
        assert (web.reached, inside.reached) == (1, 0)
        hosts["inside.example"] = ["127.0.0.1"]
        assert ask("127.0.0.1") == b"inner secret"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://example.com/x", "must be https"),
        ("ftp://example.com/x", "must be https"),
        ("file:///etc/passwd", "is no whole web address"),
        ("gopher://127.0.0.1:6379/_INFO", "must be https"),
        ("https://example.com:22/x", "has port 22, and only 80, 443 are dialled"),
        ("https://user:pass@example.com/x", "has a user name in it"),
        ("https://good.example@127.0.0.1/x", "has a user name in it"),
        ("https://good.example\\@127.0.0.1/x", "has a user name in it"),
        ("https:///x", "is no whole web address"),
        ("https://", "is no whole web address"),
        ("//127.0.0.1/x", "must be https"),
        ("https://exa mple.com/", "is no whole web address"),
        ("https://example.com/\x00", "is no whole web address"),
        ("https://example.com/\r\nHost: inside", "is no whole web address"),
        ("https://[::1/x", "is no whole web address"),
        ("https://example.com:99999999/", "has port 99999999"),
        ("https://" + "a" * 5000 + ".example/", "is no whole web address"),
    ],
)
def test_addresses_that_are_not_fetched_are_told_before_anything_is_dialled(url, problem):
    """By their form alone: scheme, port, user name; the message says what would do."""
    resolver = Watched([])
    with pytest.raises(FetchFailed, match=problem):
        get(Client(Policy(), resolver=resolver), url)
    assert resolver.calls == 0


def test_an_address_that_answers_nothing_and_one_that_may_not_be_dialled_read_the_same(web):
    """No oracle: a private host, an open and a closed port, a name that does not exist."""
    closed = Web()
    closed.server_close()
    policies = Policy.of(["127.0.0.1"], allow_http=True, ports=[closed.server_port])
    texts = set()
    for client, url in [
        (Client(policies), f"{closed.url}/x"),
        (Client(policy(web)), f"{web.url}/x"),
        (Client(policy(web), resolver=Watched([])), f"http://nowhere.example:{web.server_port}/"),
    ]:
        with pytest.raises(FetchFailed) as failure:
            get(client, url)
        texts.add(str(failure.value))
    assert texts == {UNREACHABLE}


def test_nothing_around_us_is_read(web, monkeypatch):
    """No proxy, no .netrc: the request goes to the address and carries nothing but ours."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    web.pages["/x"].headers["Set-Cookie"] = "a=b"
    client = Client(policy(web, "127.0.0.1"))
    assert get(client, f"{web.url}/x") == get(client, f"{web.url}/x") == b"secret of the intranet"
    for _, headers in web.asked:
        assert set(headers) == {"host", "user-agent", "accept", "accept-encoding"}
        assert headers["accept-encoding"] == "identity"


def test_a_host_is_allowed_by_name_and_for_that_name_alone(web):
    """An intranet mirror by its name; another name for the same number stays closed."""
    client = Client(policy(web, "mirror.example"), resolver=Watched(["127.0.0.1"]))
    assert get(client, f"http://Mirror.Example.:{web.server_port}/x") == b"secret of the intranet"
    with pytest.raises(FetchFailed):
        get(client, f"http://other.example:{web.server_port}/x")


def test_the_operators_own_site_is_dialled_at_its_very_origin(web):
    """Scheme, host and port as set, without further allowance; another port of the host stays closed."""
    client = Client(Policy.of(endpoints=[web.url]))
    assert get(client, f"{web.url}/x") == b"secret of the intranet"
    with running(Web()) as neighbour:
        with pytest.raises(FetchFailed):
            get(client, f"{neighbour.url}/x")
        assert neighbour.reached == 0


@pytest.mark.parametrize("entry", ["http://host/", "10.0.0.0/99", "a b", "", "host:80", "*"])
def test_a_wrong_allowance_is_an_error(entry):
    """Told by name, so that it is not taken for one that works."""
    with pytest.raises(ConfigError, match="fetch_allow"):
        Policy.of([entry])


def test_a_resolver_that_never_answers_is_not_waited_for():
    """The time limit covers names, too."""
    hang = threading.Event()
    backend = PinnedBackend(Policy(), Clock(0.3), lambda host, port: [str(hang.wait(5))])
    with pytest.raises(FetchFailed, match="could not be reached"):
        backend.connect_tcp("slow.example", 443)
    hang.set()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_certificates_are_checked_for_the_name_though_a_number_is_dialled(tmp_path):
    """TLS to a pinned address: right for the certificate's name, refused for another and for an unknown issuer."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=models.example",
         "-addext", "subjectAltName=DNS:models.example", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True, env={**os.environ},
    )  # fmt: skip
    server = Web()
    offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offered.load_cert_chain(cert, key)
    server.socket = offered.wrap_socket(server.socket, server_side=True)
    server.pages["/x"] = Page(b"over TLS")
    trusting = ssl.create_default_context(cafile=str(cert))
    with running(server):
        allowed = Policy.of(["127.0.0.1"], ports=[server.server_port])
        client = Client(allowed, resolver=Watched(["127.0.0.1"]), tls=trusting)
        assert get(client, f"https://models.example:{server.server_port}/x") == b"over TLS"
        with pytest.raises(FetchFailed):
            get(client, f"https://other.example:{server.server_port}/x")
        with pytest.raises(FetchFailed):
            get(Client(allowed, resolver=Watched(["127.0.0.1"])), f"https://models.example:{server.server_port}/x")
