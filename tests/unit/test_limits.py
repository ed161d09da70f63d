"""What limits promise: exact over any number of processes, one key never another's, and a time to come back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from impasto.errors import BadRequest, InvalidInput, NotFound, TooManyRequests, Unauthorized, Unavailable
from impasto.jobs.database import open_database, writing
from impasto.jobs.keys import KeyStore
from impasto.jobs.limits import DAY, NO_LIMITS, Account, KeyLimits, Limits, Used
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import NewJob
from impasto.jobs.store import JobStore
from impasto.jobs.uploads import UploadStore

NOON = 20_000 * DAY + DAY // 2


def submit(store: JobStore, key_id: str, limits: Limits = NO_LIMITS, max_queued: int = 10_000, **changes):
    return store.create(NewJob("m", {}, key_id, seed=7, **changes), max_queued, limits)


def claim(store: JobStore, n: int = 1, worker: str = "worker") -> list[str]:
    return [job.id for job in store.claim(worker, n, 30)]


def key_of(keys: KeyStore, name: str, **limits) -> str:
    return keys.authenticate(keys.create(name, limits=KeyLimits(**limits))).id


def account(now: int = NOON, used: Used | None = None, **own) -> Account:
    return Account(now, KeyLimits(**own), NO_LIMITS, used or Used(0.0, 0.0, 0))


# Requests a minute


def test_a_minutes_worth_may_come_at_once_and_then_one_at_a_time():
    """Sixty a minute: sixty now, the next a second later, and again a second later."""
    key = account(rate=60)
    for _ in range(60):
        key = key.counted()
    with pytest.raises(TooManyRequests, match="60 requests a minute; send the next in 1 seconds") as caught:
        key.counted()
    assert caught.value.retry_after == 1
    later = Account(NOON + 1000, key.own, NO_LIMITS, key.used).counted()
    with pytest.raises(TooManyRequests):
        later.counted()


@pytest.mark.parametrize("rate", [1, 3, 7, 59, 600])
def test_over_a_long_time_no_more_than_the_rate_gets_through(rate):
    """Whoever tries ten times as often for ten minutes gets ten minutes' worth and the first minute's credit."""
    key, taken, waits = account(rate=rate), 0, []
    step = max(1, 60_000 // (rate * 10))
    for now in range(NOON, NOON + 600_000, step):
        try:
            key = Account(now, key.own, NO_LIMITS, key.used).counted()
            taken += 1
        except TooManyRequests as refused:
            waits.append(refused.retry_after)
    assert set(waits) <= set(range(1, 61))
    assert rate * 11 - 1 <= taken <= rate * 11


def test_whoever_waits_as_long_as_it_is_told_gets_through():
    """``retry_after`` is no guess."""
    key = account(rate=7)
    for _ in range(7):
        key = key.counted()
    with pytest.raises(TooManyRequests) as caught:
        key.counted()
    Account(NOON + caught.value.retry_after * 1000, key.own, NO_LIMITS, key.used).counted()


def test_requests_are_counted_by_the_database_for_all_processes(store, database_url, alice):
    """Ten threads on two connections of their own send thirty jobs at once: twelve are taken, to the number."""
    other = JobStore(open_database(database_url))

    def send(n: int) -> bool:
        try:
            submit((store, other)[n % 2], alice, Limits(rate=12))
        except TooManyRequests:
            return False
        return True

    began = time.monotonic()
    with ThreadPoolExecutor(10) as pool:
        taken = sum(pool.map(send, range(30)))
    assert 12 <= taken <= 12 + (time.monotonic() - began) / 5
    other.close()
    other.engine.dispose()


def test_a_refused_request_costs_nothing(store, alice):
    """What does not become a job does not count: neither against the rate nor against the day."""
    limits = Limits(rate=2, daily=2)
    submit(store, alice, limits)
    for _ in range(3):
        with pytest.raises(TooManyRequests):
            submit(store, alice, limits, max_queued=1)
        with pytest.raises(BadRequest):
            submit(store, alice, limits, cost=3)
    submit(store, alice, limits)


def test_the_same_request_again_costs_nothing(store, alice):
    """A client that lost the answer sends its request again, and finds its job whatever the limits say."""
    limits = Limits(rate=1, daily=1)
    first = submit(store, alice, limits, max_queued=1, idempotency_key="a")
    for _ in range(5):
        assert submit(store, alice, limits, max_queued=1, idempotency_key="a").id == first.id


def test_one_keys_requests_do_not_count_for_another(store, alice, bob):
    """Every key has its own minute."""
    submit(store, alice, Limits(rate=1))
    with pytest.raises(TooManyRequests):
        submit(store, alice, Limits(rate=1))
    submit(store, bob, Limits(rate=1))


def test_a_keys_own_rate_goes_before_the_settings(store, keys):
    """More, less, or none at all."""
    few, free = key_of(keys, "few", rate=1), key_of(keys, "free", rate=0)
    submit(store, few, Limits(rate=100))
    with pytest.raises(TooManyRequests, match="1 requests a minute"):
        submit(store, few, Limits(rate=100))
    for _ in range(5):
        submit(store, free, Limits(rate=1))


def test_uploads_count_as_requests(database, tmp_path, alice, store):
    """Announced or sent as a form; a ticket's file was counted when it was announced."""
    limits = Limits(rate=2)
    uploads = UploadStore(database, OutputStore(str(tmp_path / "files")), kept=3600, limits=limits)
    file = tmp_path / "fox.png"
    file.write_bytes(b"not looked at here")
    ticket, _ = uploads.announce(alice, "fox.png", 5)
    uploads.add(alice, "fox.png", file, "image/png")
    uploads.receive(ticket, file, "image/png")
    for send in (
        lambda: uploads.announce(alice, "fox.png", 5),
        lambda: uploads.add(alice, "fox.png", file, "image/png"),
        lambda: submit(store, alice, limits),
    ):
        with pytest.raises(TooManyRequests, match="2 requests a minute"):
            send()


# Work in a day


def test_a_days_work_is_refused_until_the_next_day_in_utc():
    """Six hours before midnight the answer says six hours, and at midnight there is a new day's work."""
    evening = NOON + DAY // 4
    key = account(evening, daily=10).spent(4).spent(6)
    with pytest.raises(TooManyRequests, match=r"10 default pictures a day.*had 10 today") as caught:
        key.spent(0.1)
    assert caught.value.retry_after == 6 * 3600
    assert Account(NOON + DAY // 2, key.own, NO_LIMITS, key.used).spent(10).used.spent == 10


def test_small_costs_add_up_to_the_whole_day():
    """Ten tenths are one, whatever binary fractions say."""
    key = account(daily=1)
    for _ in range(10):
        key = key.spent(0.1)
    with pytest.raises(TooManyRequests):
        key.spent(0.1)


def test_a_request_larger_than_a_whole_day_is_no_matter_of_waiting():
    """429 would have a client come back every day, for ever."""
    with pytest.raises(BadRequest, match=r"12 default pictures.*may have 10 a day; ask for fewer"):
        account(daily=10).spent(12)


def test_the_days_work_is_counted_by_the_database(store, alice):
    """Over all processes, in default pictures."""
    limits = Limits(daily=3)
    submit(store, alice, limits, cost=2.5)
    with pytest.raises(TooManyRequests, match=r"had 2\.5 today") as caught:
        submit(store, alice, limits, cost=1)
    assert 0 < caught.value.retry_after <= 86_400
    submit(store, alice, limits, cost=0.5)


# Jobs that wait


def test_a_key_may_have_its_own_number_of_jobs_waiting(store, keys):
    """In place of the setting, in both directions."""
    many, few = key_of(keys, "many", queued=3), key_of(keys, "few", queued=1)
    for _ in range(3):
        submit(store, many, max_queued=1)
    submit(store, few)
    for key in (many, few):
        with pytest.raises(TooManyRequests, match="jobs of this key are waiting"):
            submit(store, key, max_queued=2)


def test_a_server_that_is_full_for_everybody_says_so(store, alice, bob):
    """It is not the key's fault, so it is 503; and there is room again when jobs have begun."""
    limits = Limits(waiting=2)
    submit(store, alice, limits)
    submit(store, alice, limits)
    with pytest.raises(Unavailable, match="2 jobs are waiting on this server"):
        submit(store, bob, limits)
    claim(store)
    submit(store, bob, limits)


# Jobs that run


def test_no_more_jobs_of_a_key_run_than_it_may(store, alice):
    """In one claim, in several, and after one has ended."""
    ids = [submit(store, alice, Limits(running=2)).id for _ in range(5)]
    running = store.claim("worker", 4, 30)
    assert [job.id for job in running] == ids[:2]
    assert claim(store, 4) == []
    store.complete(running[0].lease, [], {})
    assert claim(store, 4) == [ids[2]]
    store.release(running[1].lease)
    assert claim(store, 4) == [ids[1]]


def test_a_key_at_its_limit_stands_in_nobodys_way(store, alice, bob):
    """Two hundred of its jobs in front of the queue, more than a claim looks at, and others still go at once."""
    for _ in range(200):
        submit(store, alice, Limits(running=1))
    [first] = claim(store, 1)
    small = [submit(store, bob, cost=50).id for _ in range(3)]
    assert claim(store, 8) == small
    assert store.get(first).status == "processing"


def test_a_key_at_its_limit_does_not_upset_the_turns_of_others(store, keys, alice, bob):
    """Its old jobs in front are no measure of the time: a newcomer gets its turn, not credit for all that was done."""
    blocked = key_of(keys, "blocked", running=1)
    for _ in range(3):
        submit(store, blocked)
    [held] = claim(store)
    for _ in range(40):
        submit(store, alice)
    for _ in range(20):
        assert len(claim(store)) == 1
    newcomer = {submit(store, bob).id for _ in range(10)}
    order = [claim(store)[0] for _ in range(10)]
    assert 4 <= sum(id in newcomer for id in order) <= 6
    assert store.get(held).status == "processing"


def test_claims_at_the_same_time_keep_to_the_limit_together(database_url, store, alice, bob):
    """Eight workers that claim at once do not each take what only one may have."""
    for _ in range(30):
        submit(store, alice, Limits(running=3))
        submit(store, bob)
    stores = [JobStore(open_database(database_url)) for _ in range(4)]

    def work(n: int) -> list[str]:
        return [job.key_id for _ in range(3) for job in stores[n % 4].claim(f"w{n}", 2, 30)]

    with ThreadPoolExecutor(8) as pool:
        claimed = [key for got in pool.map(work, range(8)) for key in got]
    assert claimed.count(alice) == 3
    assert claimed.count(bob) == 30
    for opened in stores:
        opened.close()
        opened.engine.dispose()


def test_a_limit_on_running_jobs_holds_for_a_single_key(store, keys, bob):
    """The key's own number, whatever the settings of the API that took the job."""
    one = key_of(keys, "one", running=1)
    for _ in range(3):
        submit(store, one)
        submit(store, bob)
    claimed = store.claim("worker", 10, 30)
    assert [job.key_id for job in claimed].count(one) == 1
    assert [job.key_id for job in claimed].count(bob) == 3


# Shares


def test_a_key_of_twice_the_weight_gets_twice_the_share(store, keys, alice):
    """Of the first thirty jobs, twenty are the heavier key's."""
    heavy = key_of(keys, "heavy", weight=2)
    for _ in range(60):
        submit(store, alice)
        submit(store, heavy)
    order = [store.get(claim(store)[0]).key_id for _ in range(30)]
    assert 19 <= order.count(heavy) <= 21


# Changing limits


def test_limits_of_a_key_can_be_changed(keys, store):
    """What is not named stays, ``None`` goes back to the settings; it counts from the next request on."""
    id = key_of(keys, "phone", rate=1, weight=2)
    submit(store, id)
    assert keys.limit("phone", rate=0, queued=5).limits == KeyLimits(rate=0, queued=5, weight=2)
    submit(store, id)
    assert keys.limit(id, queued=None).limits == KeyLimits(rate=0, weight=2)
    with pytest.raises(NotFound, match="list the keys"):
        keys.limit("fone", rate=1)


@pytest.mark.parametrize(
    "wrong", [{"rate": -1}, {"running": 2**40}, {"daily": float("nan")}, {"weight": 0}, {"weight": float("inf")}]
)
def test_a_limit_that_makes_no_sense_is_refused(keys, wrong):
    """By its name."""
    keys.create("phone")
    with pytest.raises(InvalidInput) as caught:
        keys.limit("phone", **wrong)
    assert caught.value.field == next(iter(wrong))


# The end of a key


def test_an_expired_key_is_refused_and_takes_no_more_jobs(keys, store, database):
    """By the database's clock, also where a process still remembers it as good."""
    secret = keys.create("guest", lifetime=3600)
    key = keys.authenticate(secret)
    assert 3590 < (key.expires_at - key.created_at).total_seconds() <= 3600
    with writing(database) as db:
        db.execute(text("update keys set expires_at = expires_at - 3600001"))
    with pytest.raises(Unauthorized, match="has expired"):
        keys.authenticate(secret)
    with pytest.raises(Unauthorized, match="has expired"):
        submit(store, key.id)
    assert keys.list()[0].expired
    assert keys.revoke("guest").disabled_at is not None


@pytest.mark.parametrize("lifetime", [0, -1, 1e12, float("nan")])
def test_a_lifetime_must_end_in_the_future(keys, lifetime):
    """And in this century."""
    with pytest.raises(InvalidInput, match="hundred years"):
        keys.create("guest", lifetime=lifetime)


# Speed


def test_a_claim_stays_cheap_behind_keys_at_their_limit(store, keys):
    """Five such keys with 200 jobs each in front cost a claim milliseconds."""
    for n in range(5):
        id = key_of(keys, f"flood {n}", running=1)
        for _ in range(200):
            submit(store, id)
    assert len(claim(store, 8)) == 5
    began = time.monotonic()
    assert claim(store, 8) == []
    assert time.monotonic() - began < 1
