"""What API keys promise."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from impasto.errors import InvalidInput, NotFound, Unauthorized
from impasto.jobs.database import reading, writing
from impasto.jobs.keys import KeyStore, Scope
from impasto.jobs.limits import KeyLimits


def test_a_new_key_is_64_hexadecimal_digits_and_opens_the_door(keys):
    """The form that clients of hosted services expect, with 256 random bits."""
    secret = keys.create("laptop")
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert keys.authenticate(secret).name == "laptop"


def test_no_two_secrets_are_alike(keys):
    """Every key is drawn anew."""
    assert len({keys.create(f"key {n}") for n in range(20)}) == 20


def test_the_database_never_holds_a_secret(keys, database):
    """Whoever steals the file can list keys but use none."""
    secret = keys.create("laptop")
    with reading(database) as db:
        row = db.execute(text("select * from keys")).one()
    assert not any(secret in str(value) for value in row)


def test_spaces_around_a_pasted_key_do_no_harm(keys):
    """Copying a key from a terminal often brings a line end with it."""
    secret = keys.create("laptop")
    assert keys.authenticate(f"  {secret}\r\n").name == "laptop"


@pytest.mark.parametrize("secret", ["f" * 64, "x", "ключ", "\ud800", "\0", "' or 1=1 --", "a" * 100_000])
def test_an_unknown_key_is_refused(keys, secret):
    """Whatever is sent as a key, the answer is the same and says what to do."""
    keys.create("laptop")
    with pytest.raises(Unauthorized, match="not known; check that it was copied whole"):
        keys.authenticate(secret)


@pytest.mark.parametrize("secret", ["", " ", "\n"])
def test_an_empty_key_is_refused_with_the_header_to_send(keys, secret):
    """The commonest mistake of all is an unset variable."""
    with pytest.raises(Unauthorized, match="Authorization: Bearer"):
        keys.authenticate(secret)


def test_almost_the_key_is_not_the_key(keys):
    """One digit off, upper case, or half of it: all unknown."""
    secret = keys.create("laptop")
    wrong_digit = ("0" if secret[0] != "0" else "1") + secret[1:]
    for near_miss in (wrong_digit, secret.upper() + "A", secret[:32], secret * 2):
        with pytest.raises(Unauthorized):
            keys.authenticate(near_miss)


def test_a_revoked_key_is_refused_at_once_and_says_why(keys):
    """There is no cache between a revocation and its effect."""
    secret = keys.create("laptop")
    keys.revoke("laptop")
    with pytest.raises(Unauthorized, match="revoked"):
        keys.authenticate(secret)


def test_revoking_one_key_leaves_the_others(keys):
    """Keys are independent."""
    keys.create("laptop")
    kept = keys.create("server")
    keys.revoke("laptop")
    assert keys.authenticate(kept).name == "server"


def test_a_key_can_be_revoked_by_its_id(keys):
    """The id is what the list shows, and it never means two keys."""
    key = keys.authenticate(keys.create("laptop"))
    revoked = keys.revoke(key.id)
    assert (revoked.id, revoked.name) == (key.id, "laptop")
    assert revoked.disabled_at is not None


def test_revoking_what_is_not_there_says_so(keys):
    """A typing mistake must not look like a success; nor must a second revocation."""
    keys.create("laptop")
    keys.revoke("laptop")
    for name in ("laptop", "desktop", ""):
        with pytest.raises(NotFound, match="list the keys"):
            keys.revoke(name)


def test_the_list_shows_every_key_and_no_secret(keys):
    """Name, first characters and dates are enough to tell keys apart."""
    secrets = {name: keys.create(name) for name in ("laptop", "server")}
    keys.revoke("laptop")
    laptop, server = sorted(keys.list(), key=lambda key: key.name)
    assert laptop.prefix == secrets["laptop"][:6]
    assert laptop.disabled_at is not None
    assert server.disabled_at is None
    assert not any(secret in repr(keys.list()) for secret in secrets.values())


def test_a_key_knows_when_it_was_made_in_utc(keys):
    """To the millisecond, by the database's clock."""
    key = keys.authenticate(keys.create("laptop"))
    assert key.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - key.created_at) < timedelta(seconds=10)


def test_two_keys_in_use_cannot_share_a_name(keys):
    """Else ``revoke NAME`` would have to guess."""
    keys.create("laptop")
    with pytest.raises(InvalidInput, match="'laptop' is taken") as caught:
        keys.create("laptop")
    assert caught.value.field == "name"


def test_the_name_of_a_revoked_key_is_free_again(keys):
    """Replacing a leaked key does not force a new name."""
    keys.create("laptop")
    keys.revoke("laptop")
    assert keys.authenticate(keys.create("laptop")).name == "laptop"
    assert len(keys.list()) == 2


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "a\0b", "\ud800", "n" * 101])
def test_a_name_must_be_readable(keys, name):
    """It is printed in lists and logs."""
    with pytest.raises(InvalidInput, match="printable"):
        keys.create(name)


def test_any_tells_whether_a_key_can_be_used(keys):
    """The service prints a first key when there is none."""
    assert not keys.any()
    keys.create("laptop")
    assert keys.any()
    keys.revoke("laptop")
    assert not keys.any()


def test_a_key_has_all_scopes_unless_some_are_named(keys):
    """In any order, and at least one."""
    assert keys.authenticate(keys.create("all")).scopes == set(Scope)
    some = keys.authenticate(keys.create("some", scopes=[Scope.METRICS, Scope.READ]))
    assert some.scopes == {Scope.READ, Scope.METRICS}
    with pytest.raises(InvalidInput, match="generate, read, metrics"):
        keys.create("none", scopes=[])


def test_a_key_from_before_there_were_scopes_may_do_everything(database, keys):
    """An upgrade takes nothing away."""
    with writing(database) as db:
        columns = "insert into keys (id, name, prefix, secret_hash, created_at) values ('a', 'old', 'x', 'y', 1)"
        db.execute(text(columns))
    [old] = keys.list()
    assert (old.scopes, old.limits, old.expires_at) == (set(Scope), KeyLimits(), None)


def test_keys_made_by_another_process_work_at_once(keys, database):
    """``impasto keys create`` runs beside the server."""
    assert keys.authenticate(KeyStore(database).create("laptop")).name == "laptop"
