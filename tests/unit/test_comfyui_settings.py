"""Which server the nodes ask: the environment before the user's settings, and the key to no host but those allowed."""

import json

import pytest

from impasto.comfyui.settings import USER_SETTINGS, allowed_hosts, find_connection, read_user_settings
from impasto.errors import ConfigError

KEY = {"IMPASTO_API_KEY": "from-environment"}
USER = {"Impasto.ServerURL": "http://localhost:9000", "Impasto.APIKey": "from-settings"}


def test_the_environment_goes_first():
    """What whoever starts ComfyUI says is not overruled by a page."""
    found = find_connection(USER, {"IMPASTO_SERVER_URL": "https://gpu.example", **KEY})
    assert (found.url, found.key) == ("https://gpu.example", "from-environment")


def test_the_users_settings_serve_where_the_environment_is_silent():
    """Settings alone are enough for a server on this machine."""
    found = find_connection(USER, {})
    assert (found.url, found.key) == ("http://localhost:9000", "from-settings")


def test_nothing_but_a_key_is_a_server_here():
    """The default address is the one that ``impasto serve`` listens on."""
    assert find_connection({}, KEY).url == "http://127.0.0.1:8000"


def test_no_key_says_where_one_comes_from():
    """The error names the command, the variable and the dialog; an empty key is none."""
    for user in ({}, {"Impasto.APIKey": "  "}, {"Impasto.APIKey": 7}):
        with pytest.raises(ConfigError, match=r"impasto keys create.*IMPASTO_API_KEY.*Settings"):
            find_connection(user, {"IMPASTO_API_KEY": ""})


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example",
        "http://127.0.0.1.evil.example:8000",
        "http://localhost.evil.example",
        "https://gpu.example.evil.example",
        "https://xgpu.example",
        "http://[::2]:8000",
        "http://0.0.0.0:8000",
        "http://2130706434:8000",
    ],
)
@pytest.mark.parametrize("environment", [KEY, {}, {"IMPASTO_SERVER_HOSTS": "gpu.example", **KEY}])
def test_settings_cannot_send_a_key_elsewhere(url, environment):
    """A host that nobody allowed is refused, whoever's key it would get, and the error says how to allow it."""
    with pytest.raises(ConfigError, match="IMPASTO_SERVER_HOSTS="):
        find_connection({**USER, "Impasto.ServerURL": url}, environment)


@pytest.mark.parametrize("url", ["http://gpu.example@evil.example", "http://evil.example@gpu.example/"])
def test_an_address_with_a_users_name_is_refused(url):
    """Such addresses are there to mislead readers."""
    with pytest.raises(ConfigError):
        find_connection({"Impasto.ServerURL": url}, {"IMPASTO_SERVER_HOSTS": "gpu.example,evil.example", **KEY})


@pytest.mark.parametrize(
    ("hosts", "url", "so"),
    [
        ("gpu.example", "https://gpu.example", True),
        ("GPU.example , other.example", "https://gpu.EXAMPLE:8443/impasto", True),
        ("gpu.example:8443", "https://gpu.example:8443", True),
        ("gpu.example:8443", "https://gpu.example", False),
        ("gpu.example:443", "https://gpu.example", True),
        ("gpu.example:80", "https://gpu.example", False),
        ("", "http://127.0.0.1:1234", True),
        ("", "http://[::1]:8000", True),
    ],
)
def test_hosts_are_allowed_by_name_and_if_given_by_port(hosts, url, so):
    """The list is exact: a host, or a host and a port."""
    user = {**USER, "Impasto.ServerURL": url}
    if so:
        assert find_connection(user, {"IMPASTO_SERVER_HOSTS": hosts}).url == url
    else:
        with pytest.raises(ConfigError):
            find_connection(user, {"IMPASTO_SERVER_HOSTS": hosts})


def test_the_environments_server_is_allowed_and_others_are_not():
    """Naming a server in the environment allows that host with that port alone."""
    assert "gpu.example:8443" in allowed_hosts({"IMPASTO_SERVER_URL": "https://gpu.example:8443"})
    assert "evil.example" not in allowed_hosts({"IMPASTO_SERVER_URL": "https://gpu.example:8443"})


def test_the_key_is_not_in_what_is_printed():
    """A log of the connection does not hold it."""
    assert "from-environment" not in repr(find_connection({}, KEY))


def test_user_settings_are_read_as_comfyui_writes_them(tmp_path):
    """The default user's file; a broken or absent one says nothing."""
    assert read_user_settings(tmp_path) == {}
    file = tmp_path / USER_SETTINGS
    file.parent.mkdir()
    file.write_text(json.dumps(USER))
    assert read_user_settings(tmp_path) == USER
    for broken in ("{", "[]", "3"):
        file.write_text(broken)
        assert read_user_settings(tmp_path) == {}
