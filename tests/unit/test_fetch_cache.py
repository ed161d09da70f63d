"""The cache of fetched files: whole or not at all, once for everybody, within its quota, useful without a network."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from impasto.fetch.addresses import Policy
from impasto.fetch.cache import Cache
from impasto.fetch.client import Client
from impasto.fetch.failure import FetchFailed
from impasto.fetch.transfer import Remote
from tests.sites import Page, Web, redirect, running

ROOT = Path(__file__).parents[2]


class Notes:
    """Files that begin with ``note`` and have more than that."""

    suffix = ".note"

    def begins(self, start):
        return start.startswith(b"note")

    def check(self, path):
        if not path.read_bytes().startswith(b"note "):
            raise FetchFailed("content", "is no note")


def note(size=5000, of="a"):
    return b"note " + of.encode() * (size - 5)


@pytest.fixture
def web():
    with running(Web()) as server:
        yield server


def make_cache(folder, web, **options):
    client = Client(Policy.of(["127.0.0.1", "localhost"], allow_http=True, ports=[web.server_port]))
    return Cache(folder, client, Notes(), **{"quota": 10**6, "max_bytes": 10**5, "seconds": 20} | options)


@pytest.fixture
def cache(tmp_path, web):
    return make_cache(tmp_path, web)


def fetch(cache, url, fresh=0.0, **facts):
    return cache.get(url, lambda clock: Remote(url, f"note:{url}", **facts), fresh=fresh)


def blobs(folder):
    return sorted(path.name for path in (folder / "blobs").iterdir())


def asked(web):
    return [path for path, _ in web.asked]


def test_a_file_is_fetched_once_and_kept_by_its_content(tmp_path, web, cache):
    """Through the redirect that sites answer; a second address of the same bytes adds no second file."""
    web.pages |= {"/a": redirect("/cdn/a"), "/cdn/a": Page(note()), "/b": Page(note())}
    found = fetch(cache, f"{web.url}/a", fresh=60)
    assert found.path.read_bytes() == note()
    assert found.path.name == hashlib.sha256(note()).hexdigest() + ".note"
    assert fetch(cache, f"{web.url}/a", fresh=60).path == found.path
    assert asked(web) == ["/a", "/cdn/a"]
    assert fetch(cache, f"{web.url}/b").path == found.path
    assert len(blobs(tmp_path)) == 1


def test_the_site_is_asked_again_only_after_a_while_and_answers_304(tmp_path, web, cache):
    """The ETag is shown; a new one brings the new file."""
    web.pages["/a"] = Page(note(), etag='"v1"')
    url = f"{web.url}/a"
    first = fetch(cache, url)
    assert fetch(cache, url).path == first.path
    assert web.asked[-1][1]["if-none-match"] == '"v1"'
    web.pages["/a"] = Page(note(of="b"), etag='"v2"')
    assert fetch(cache, url, fresh=60).path == first.path
    assert len(web.asked) == 2
    second = fetch(cache, url)
    assert second.path.read_bytes() == note(of="b")
    assert len(blobs(tmp_path)) == 2


@pytest.mark.parametrize("status", [None, 429, 500, 503])
def test_with_the_site_away_the_cache_answers(web, cache, status):
    """Gone, overloaded or broken; what was never fetched is an error as before."""
    web.pages["/a"] = Page(note())
    url = f"{web.url}/a"
    path = fetch(cache, url).path
    if status is None:
        web.shutdown()
        web.server_close()
    else:
        web.pages["/a"] = Page(b"", status)
    assert fetch(cache, url).path == path
    with pytest.raises(FetchFailed):
        fetch(cache, f"{web.url}/b")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_site_has_taken_back_is_not_served_from_the_cache(web, cache, status):
    """Deleted or closed is an answer, not an absence."""
    web.pages["/a"] = Page(note())
    fetch(cache, f"{web.url}/a")
    web.pages["/a"] = Page(b"", status)
    with pytest.raises(FetchFailed) as failure:
        fetch(cache, f"{web.url}/a")
    assert failure.value.status == status


def test_a_transfer_that_breaks_off_goes_on_where_it_was(web, cache):
    """The second request asks for the rest, on condition that the file is still the same."""
    web.pages["/a"] = Page(note(), etag='"v1"', cut_once=3000)
    assert fetch(cache, f"{web.url}/a").path.read_bytes() == note()
    ranges = [(headers.get("range"), headers.get("if-range")) for _, headers in web.asked]
    assert ranges == [(None, None), ("bytes=3000-", '"v1"')]


def test_a_file_that_changed_in_between_is_fetched_anew(tmp_path, web, cache):
    """No half of the old and half of the new; the same where the server knows no ranges, and after a restart."""
    for new in (Page(note(of="b"), etag='"v2"'), Page(note(of="c"), ranges=False)):
        web.pages["/a"] = Page(note(), etag='"v1"', cut_once=3000)
        url = f"{web.url}/a?{new.etag}"
        interrupted(cache, web, url)
        web.pages["/a"] = new
        assert fetch(cache, url).path.read_bytes() == new.body


def interrupted(cache, web, url, **facts):
    """Fetch until the first break, and no further."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("impasto.fetch.cache.TRIES", 1)
        with pytest.raises(FetchFailed, match="broke off"):
            fetch(cache, url, **facts)


def test_a_stated_hash_is_checked(tmp_path, web, cache):
    """Whole bytes that are not the ones are no file; the right ones are, also when the transfer was resumed."""
    web.pages["/a"] = Page(note())
    with pytest.raises(FetchFailed, match="other bytes than its site states") as failure:
        fetch(cache, f"{web.url}/a", sha256="0" * 64)
    assert failure.value.reason == "mismatch"
    assert blobs(tmp_path) == [] and list((tmp_path / "parts").iterdir()) == []

    right = hashlib.sha256(note()).hexdigest()
    web.pages["/b"] = Page(note(), cut_once=3000)
    assert fetch(cache, f"{web.url}/b", sha256=right).path.name == f"{right}.note"
    assert web.asked[-1][1]["range"] == "bytes=3000-"
    assert "if-range" not in web.asked[-1][1]
    asked_before = len(web.asked)
    fetch(cache, f"{web.url}/elsewhere", sha256=right)
    assert len(web.asked) == asked_before, "known content is not fetched again"


def test_a_hash_in_the_head_of_the_answer_is_checked_too(tmp_path, web, cache):
    """A hub states it before it redirects to the store of its large files."""
    web.pages["/a"] = redirect("/cdn")
    web.pages["/a"].headers["X-Linked-ETag"] = '"' + "1" * 64 + '"'
    web.pages["/cdn"] = Page(note())
    with pytest.raises(FetchFailed, match="other bytes"):
        fetch(cache, f"{web.url}/a")
    web.pages["/a"].headers["X-Linked-ETag"] = f'"{hashlib.sha256(note()).hexdigest()}"'
    assert fetch(cache, f"{web.url}/a").path.read_bytes() == note()


def test_a_resumed_file_with_a_wrong_start_is_fetched_once_more(tmp_path, web, cache):
    """Somebody else's bytes in the part file are found out by the hash, and only cost time."""
    right = hashlib.sha256(note()).hexdigest()
    web.pages["/a"] = Page(note(), cut_once=3000)
    interrupted(cache, web, f"{web.url}/a", sha256=right)
    [part] = [path for path in (tmp_path / "parts").iterdir() if path.suffix == ".part"]
    part.write_bytes(b"x" * 3000)
    assert fetch(cache, f"{web.url}/a", sha256=right).path.read_bytes() == note()


def test_the_wrong_kind_of_file_is_left_after_its_first_bytes(tmp_path, web, cache):
    """A login page of any length costs half a kilobyte; nothing of it stays."""
    web.pages["/page"] = Page(b"<html>" + bytes(90_000), gate=None)
    web.pages["/short"] = Page(b"no")
    for path in ("/page", "/short"):
        with pytest.raises(FetchFailed, match="is no note"):
            fetch(cache, f"{web.url}{path}")
    assert blobs(tmp_path) == [] and list((tmp_path / "parts").iterdir()) == []


def test_too_large_a_file_is_refused_however_it_is_found_out(tmp_path, web, cache):
    """Stated by the site, by the length, or only by counting; nothing of it stays."""
    web.pages["/a"] = Page(note(200_000))
    for facts in ({"size": 200_000}, {}):
        with pytest.raises(FetchFailed) as failure:
            fetch(cache, f"{web.url}/a", **facts)
        assert failure.value.reason == "too_large"
    assert list((tmp_path / "parts").iterdir()) == []


def test_the_least_recently_used_files_go_and_never_one_in_use(tmp_path, web):
    """Three fit; the fourth sends away the one used longest ago that nobody holds."""
    cache = make_cache(tmp_path, web, quota=15_000)
    held = {}
    for name in "abc":
        web.pages[f"/{name}"] = Page(note(of=name))
        held[name] = fetch(cache, f"{web.url}/{name}", fresh=60)
        os.utime(held[name].path, (1000 + ord(name),) * 2)
    held.pop("b").release()
    held.pop("c").release()
    web.pages["/d"] = Page(note(of="d"))
    fetch(cache, f"{web.url}/d").release()
    left = {(tmp_path / "blobs" / name).read_bytes()[-1:] for name in blobs(tmp_path)}
    assert left == {b"a", b"c", b"d"}, "a is the oldest, but held; b went"
    held.pop("a")
    web.pages["/e"] = Page(note(of="e"))
    fetch(cache, f"{web.url}/e").release()
    assert len(blobs(tmp_path)) == 3
    assert fetch(cache, f"{web.url}/b").path.read_bytes() == note(of="b"), "what went is fetched again"


def test_a_file_held_by_another_process_stays(tmp_path, web):
    """The lock is the file's, not the process's; when that process dies the file is free."""
    cache = make_cache(tmp_path, web, quota=9000)
    web.pages |= {"/a": Page(note(of="a")), "/b": Page(note(of="b"))}
    found = fetch(cache, f"{web.url}/a")
    found.release()
    script = "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH)"
    script += "; print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(found.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        fetch(cache, f"{web.url}/b").release()
        assert found.path.is_file()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    web.pages["/c"] = Page(note(of="c"))
    fetch(cache, f"{web.url}/c").release()
    assert not found.path.is_file()


def test_unfinished_downloads_count_against_the_quota(tmp_path, web):
    """Many half files of many addresses cannot fill the disk."""
    cache = make_cache(tmp_path, web, quota=12_000)
    for index in range(6):
        web.pages[f"/{index}"] = Page(note(of=str(index)), etag='"v"', cut_once=3000)
        interrupted(cache, web, f"{web.url}/{index}")
    web.pages["/a"] = Page(note())
    fetch(cache, f"{web.url}/a")
    total = sum(path.stat().st_size for name in ("blobs", "parts") for path in (tmp_path / name).iterdir())
    assert total <= 12_000 + 1000


def test_a_full_disk_is_told_as_such(tmp_path, web, cache):
    """The device says so in the middle of a file; nothing is taken for one."""
    web.pages["/a"] = Page(note())
    key = hashlib.sha256(f"{web.url}/a".encode()).hexdigest()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / f"{key}.part").symlink_to("/dev/full")
    with pytest.raises(FetchFailed, match="does not fit on the server's disk") as failure:
        fetch(cache, f"{web.url}/a")
    assert failure.value.reason == "no_space"
    assert blobs(tmp_path) == []
    assert fetch(cache, f"{web.url}/a").path.read_bytes() == note(), "with room again it works"


def test_a_disk_with_too_little_room_is_told_before_the_download(tmp_path, web, cache, monkeypatch):
    """By the stated length, against what the disk has."""
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("impasto.fetch.cache.shutil.disk_usage", lambda folder: usage)
    web.pages["/a"] = Page(note())
    with pytest.raises(FetchFailed, match=r"disk has 0\.0001 free"):
        fetch(cache, f"{web.url}/a")


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from tests.unit.test_fetch_cache import Notes, Remote, Cache, Client, Policy
folder, url, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
client = Client(Policy.of(["127.0.0.1"], allow_http=True, ports=[port]))
cache = Cache(folder, client, Notes(), quota=10**9, max_bytes=10**8, seconds=30)
print("ready", flush=True)
sys.stdin.readline()
print(cache.get(url, lambda clock: Remote(url, "note"), fresh=60).path.stat().st_size, flush=True)
"""


def child(folder, web, url):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), url, str(web.server_port), str(ROOT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_of_two_processes_one_downloads_and_the_other_waits(tmp_path, web):
    """The same file at the same moment: asked for once, had by both."""
    gate = threading.Event()
    web.pages["/a"] = Page(note(50_000), gate=gate)
    first, second = (child(tmp_path, web, f"{web.url}/a") for _ in range(2))
    try:
        for process in (first, second):
            process.stdin.write("go\n")
            process.stdin.flush()
        time.sleep(1.5)
        assert len(web.asked) == 1
        gate.set()
        assert first.stdout.readline() == second.stdout.readline() == "50000\n"
        assert len(web.asked) == 1
    finally:
        ended(first)
        ended(second)


def test_a_killed_download_leaves_no_file_and_the_next_goes_on(tmp_path, web):
    """SIGKILL in the middle: no blob, no lock; the bytes that came are not asked for again."""
    gate = threading.Event()
    web.pages["/a"] = Page(note(50_000), etag='"v1"', gate=gate)
    process = child(tmp_path, web, f"{web.url}/a")
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
        until = time.monotonic() + 10
        while not web.asked and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        ended(process)
    assert blobs(tmp_path) == []
    gate.set()
    assert fetch(make_cache(tmp_path, web), f"{web.url}/a").path.read_bytes() == note(50_000)


def test_threads_share_one_download(tmp_path, web, cache):
    """Eight at once, one request."""
    web.pages["/a"] = Page(note())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch(cache, f"{web.url}/a", fresh=60), range(8)))
    assert len({held.path for held in found}) == 1
    assert asked(web) == ["/a"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sha256": 3}', b'{"sha256": "../../x"}', b"\xff"])
def test_a_spoilt_index_is_only_a_miss(tmp_path, web, cache, content):
    """It is fetched again, and nothing outside the folder is opened."""
    web.pages["/a"] = Page(note())
    fetch(cache, f"{web.url}/a")
    [entry] = (tmp_path / "index").iterdir()
    if content.startswith(b'{"sha'):
        content = json.dumps(json.loads(entry.read_bytes()) | json.loads(content)).encode()
    entry.write_bytes(content)
    assert fetch(cache, f"{web.url}/a", fresh=60).path.read_bytes() == note()
    assert len(web.asked) == 2


def test_a_wait_that_nobody_needs_ends(tmp_path, web, cache):
    """While another downloads, a cancelled job does not wait for it."""
    gate, gone = threading.Event(), threading.Event()
    web.pages["/a"] = Page(note(), gate=gate)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(fetch, cache, f"{web.url}/a", 60)
        while not web.asked:
            time.sleep(0.02)
        url = f"{web.url}/a"
        other = pool.submit(cache.get, url, lambda clock: Remote(url, "x"), fresh=60, stop=gone.is_set)
        time.sleep(0.2)
        gone.set()
        with pytest.raises(FetchFailed) as failure:
            other.result(5)
        assert failure.value.reason == "stopped"
        gate.set()
        assert slow.result(10).path.is_file()


def test_what_is_kept_does_not_grow_with_the_addresses_asked_for(tmp_path, web, cache, monkeypatch):
    """Names that lead nowhere, that break off, and many names of one file: locks, index and parts are bounded."""
    monkeypatch.setattr("impasto.fetch.cache.MOST_ENTRIES", 5)
    monkeypatch.setattr("impasto.fetch.cache.MOST_PARTS", 6)
    monkeypatch.setattr("impasto.fetch.cache.LOCK_DIGITS", 1)
    web.pages |= {"/a": Page(note())}
    for number in range(40):
        with pytest.raises(FetchFailed, match="status 404"):
            fetch(cache, f"{web.url}/none?{number}")
        fetch(cache, f"{web.url}/a?{number}").release()
    for number in range(8):
        web.pages[f"/cut{number}"] = Page(note(of=str(number)), etag='"v"', cut_once=3000)
        interrupted(cache, web, f"{web.url}/cut{number}")
    fetch(cache, f"{web.url}/a?last").release()
    assert len(list((tmp_path / "locks").iterdir())) <= 16 + 1
    assert len(list((tmp_path / "index").iterdir())) == 5
    assert len(list((tmp_path / "parts").iterdir())) <= 6
    asked_before = len(web.asked)
    fetch(cache, f"{web.url}/a?last", fresh=60).release()
    assert len(web.asked) == asked_before, "the latest are known"
    assert fetch(cache, f"{web.url}/a?0", fresh=60).path.read_bytes() == note(), "what was forgotten is asked again"


def test_addresses_that_share_a_lock_are_fetched_one_after_the_other(tmp_path, web, cache, monkeypatch):
    """With one lock for all of them nothing hangs and nothing is mixed up."""
    monkeypatch.setattr("impasto.fetch.cache.LOCK_DIGITS", 0)
    for name in "abcdef":
        web.pages[f"/{name}"] = Page(note(of=name))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: fetch(cache, f"{web.url}/{name}"), "abcdef"))
    assert [held.path.read_bytes()[-1:] for held in found] == [name.encode() for name in "abcdef"]
