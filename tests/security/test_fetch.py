"""The operator's lists: hosts, repositories and receivers that may be dialled, and nothing else, at every hop."""

from __future__ import annotations

import httpx
import pytest

from impasto.api.delivery import poster_of
from impasto.api.pictures import PictureSource
from impasto.config import Settings
from impasto.errors import ConfigError, LoraError
from impasto.fetch.addresses import Policy
from impasto.fetch.allowed import Hosts, Repositories
from impasto.fetch.client import Client
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from impasto.fetch.reference import parse_reference
from impasto.worker.loras import LoraLibrary, policy_of
from tests.hub_server import Repository, running_hub
from tests.sites import Page, Web, redirect, running
from tests.unit.test_fetch_guard import LOOPBACK
from tests.unit.test_lora_gate import pair

FIELD = "loras.0.path"


@pytest.fixture
def web():
    with running(Web()) as server:
        server.pages["/x"] = Page(pair())
        yield server


def test_an_unguarded_client_reaches_what_ours_does_not(web):
    """The control of the whole table of spellings: most of them lead a plain client to this machine; ours to none."""
    web.pages["/x"] = Page(b"sentinel")
    reached, ours = 0, Client(Policy.of([], allow_http=True, ports=[web.server_port]))
    for host in LOOPBACK:
        url = f"http://{host}:{web.server_port}/x"
        try:
            reached += httpx.get(url, trust_env=False, timeout=5).content == b"sentinel"
        except (httpx.HTTPError, httpx.InvalidURL):
            continue
    assert reached >= 9
    before = web.reached
    for host in LOOPBACK:
        with pytest.raises(FetchFailed), ours.open(f"http://{host}:{web.server_port}/x", Clock(5), max_bytes=9):
            pass
    assert web.reached == before


def client(web, *only, **options):
    hosts = Hosts.of(only, "fetch_hosts") if only else None
    policy = Policy.of(["127.0.0.1"], allow_http=True, ports=[web.server_port], only=hosts, **options)
    return Client(policy, resolver=lambda host, port: ["127.0.0.1"])


def got(client, url):
    with client.open(url, Clock(5), max_bytes=10_000) as answer:
        return answer.read()


@pytest.mark.parametrize(
    ("only", "host", "taken"),
    [
        (["models.example"], "models.example", True), (["models.example"], "MODELS.example.", True),
        (["*.example"], "a.b.example", True), (["*.example"], "example", False), (["*.example"], "badexample", False),
        (["models.example"], "other.example", False), (["models.example"], "models.example.evil", False),
        (["127.0.0.1"], "127.0.0.1", True), (["models.example"], "127.0.0.1", False),
    ],
)  # fmt: skip
def test_only_listed_hosts_are_dialled(web, only, host, taken):
    """By their names; the control: without a list all of these are reached."""
    url = f"http://{host}:{web.server_port}/x"
    assert got(client(web), url) == pair()
    before = web.reached
    if taken:
        assert got(client(web, *only), url) == pair()
    else:
        with pytest.raises(FetchFailed, match="not on this server's list of hosts"):
            got(client(web, *only), url)
        assert web.reached == before


def test_a_listed_host_does_not_lead_to_another(web):
    """Each hop is held against the list; only where the operator's own site leads is its own business."""
    web.pages["/go"] = redirect(f"http://other.example:{web.server_port}/x")
    url = f"http://models.example:{web.server_port}/go"
    with pytest.raises(FetchFailed, match="redirects to an address that is not on this server's list"):
        got(client(web, "models.example"), url)
    assert web.reached == 1
    assert got(client(web, "models.example", "other.example"), url) == pair()
    own = client(web, "nothing.example", endpoints=[f"http://models.example:{web.server_port}"])
    assert got(own, url) == pair()


def test_the_settings_reach_loras_pictures_and_webhooks(tmp_path):
    """One list for what is fetched, another for what is sent; an empty one lets nothing through."""
    settings = Settings(data_dir=tmp_path, model="fake", fetch_hosts=["a.example"], webhook_hosts=["b.example"])
    for policy in (policy_of(settings), PictureSource.of(settings, None)._client._policy):
        assert policy.read_url("https://a.example/x")
        with pytest.raises(FetchFailed, match="list of hosts"):
            policy.read_url("https://b.example/x")
    poster = poster_of(settings)
    assert poster.check("https://b.example/x")
    with pytest.raises(FetchFailed, match="list of hosts"):
        poster.check("https://a.example/x")
    nothing = Settings(data_dir=tmp_path, model="fake", fetch_hosts=[])
    with pytest.raises(FetchFailed):
        policy_of(nothing).read_url("https://a.example/x")
    assert policy_of(Settings(data_dir=tmp_path, model="fake")).read_url("https://a.example/x"), "the control"


REFERENCES = [
    ("owner/name", ["owner/name"], True), ("Owner/Name", ["owner/name"], True), ("owner/name", ["owner/*"], True),
    ("owner/name/file.safetensors@main", ["owner/name"], True), ("hf:owner/name", ["owner/name"], True),
    ("https://huggingface.co/owner/name/blob/main/a.safetensors", ["owner/name"], True),
    ("owner/name", ["other/name"], False), ("owner/name2", ["owner/name"], False), ("owner/name", ["civitai:*"], False),
    ("owner/name", [], False), ("civitai:7@9", ["civitai:7"], True), ("civitai:7", ["civitai:*"], True),
    ("civitai:7@9", ["civitai:8"], False), ("https://civitai.com/api/download/models/9", ["civitai:7"], False),
    ("https://civitai.com/api/download/models/9", ["civitai:*"], True),
    ("https://files.example/x.safetensors", ["owner/name", "*"], False),
    ("https://huggingface.co/datasets/owner/name/resolve/main/x.safetensors", ["owner/*"], False),
    ("https://owner/name", ["owner/name"], False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "listed", "taken"), REFERENCES)
def test_only_listed_repositories_are_fetched_from(text, listed, taken):
    """In every spelling of a repository; an address that is of none is not on the list of them."""
    repositories, wanted = Repositories.of(listed), parse_reference(text)
    if taken:
        repositories.check(wanted)
    else:
        with pytest.raises(FetchFailed, match="not on this server's list of repositories"):
            repositories.check(wanted)


def test_an_address_of_no_repository_needs_a_listed_host():
    """Where there is a list of repositories; its host counts as it is dialled, without user or port."""
    repositories = Repositories.of(["owner/name"], Hosts.of(["files.example"], "fetch_hosts"))
    repositories.check(parse_reference("https://files.example:443/x.safetensors"))
    for text in ("https://other.example/x", "https://files.example@other.example/x", "https://[/x"):
        with pytest.raises((FetchFailed, ValueError)):
            repositories.check(parse_reference(text))


def test_the_library_asks_no_site_for_what_is_not_listed(tmp_path):
    """The refusal names the field and dials nothing; aliases are the operator's own word; the control is fetched."""
    with running_hub() as hub:
        hub.repositories |= {f"{owner}/n": Repository({"a.safetensors": pair()}) for owner in ("team", "other")}
        reach = {"fetch_allow": ["127.0.0.1", "localhost"], "fetch_http": True, "fetch_ports": [hub.server_port]}
        settings = {"data_dir": tmp_path, "model": "fake", "hf_endpoint": hub.url, **reach}
        listed = LoraLibrary.of(Settings(**settings, lora_repos=["team/*"], lora_aliases={"theirs": "other/n"}))
        for text in ("other/n", f"{hub.url}/other/n", f"{hub.url}/datasets/other/n/resolve/main/a.safetensors"):
            with pytest.raises(LoraError, match="list of repositories") as refused:
                listed.find(text, FIELD, "key")
            assert refused.value.field == FIELD
        assert hub.asked == []
        assert listed.find("team/n", FIELD, "key").file.read_bytes() == pair()
        assert listed.find("theirs", FIELD, "key").file.read_bytes() == pair()
        assert LoraLibrary.of(Settings(**settings)).find("other/n", FIELD, "key").file.read_bytes() == pair()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fetch_hosts", "https://a.example"), ("fetch_hosts", "a.example/x"), ("fetch_hosts", "a*.example"),
        ("webhook_hosts", "a.example:443"), ("lora_repos", "owner"), ("lora_repos", "civitai:x"),
        ("lora_repos", "a/b/c"),
    ],
)  # fmt: skip
def test_a_wrong_entry_stops_start_up(tmp_path, setting, value):
    """By the setting's name: an entry that matches nothing would be taken for one that does."""
    settings = Settings(data_dir=tmp_path, model="fake", **{setting: [value]})
    with pytest.raises(ConfigError, match=setting):
        poster_of(settings) if setting.startswith("webhook") else LoraLibrary.of(settings)
