"""What the store of uploads promises: tickets, quotas, whose is what, and how it ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from impasto.errors import NotFound, TooManyRequests, Unauthorized
from impasto.jobs.database import writing
from impasto.jobs.outputs import LORA_TYPE, OutputStore
from impasto.jobs.uploads import UploadStore
from impasto.worker.uploads import UploadedLoras

DAY = 86400.0


@pytest.fixture
def outputs(tmp_path):
    return OutputStore(str(tmp_path / "outputs"))


@pytest.fixture
def uploads(database, outputs):
    return UploadStore(database, outputs, kept=DAY, quota=1000)


@pytest.fixture
def file(tmp_path):
    """A file of 100 bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    return path


def stored(outputs) -> set[str]:
    return set(outputs.older("uploads/", 0))


def age(database, seconds: float) -> None:
    """Let time go by for every upload."""
    with writing(database) as db:
        db.execute(text(f"update uploads set created_at = created_at - {round(seconds * 1000)}"))


def test_a_file_comes_in_by_its_ticket_and_is_found(uploads, outputs, file, alice):
    """Under the id that the ticket told before; nothing is found before it came."""
    ticket, secret = uploads.announce(alice, "a.png", 100)
    assert len(secret) == 64
    assert secret not in (ticket.id, ticket.filename)
    with pytest.raises(NotFound):
        uploads.find(ticket.id)
    assert uploads.ticket(secret) == ticket
    upload = uploads.receive(ticket, file, "image/png")
    assert uploads.find(ticket.id) == upload
    assert (upload.key_id, upload.filename, upload.content_type, upload.size) == (alice, "a.png", "image/png", 100)
    assert outputs.get_upload(upload.blob) == b"x" * 100
    with pytest.raises(NotFound, match="ask for another"):
        uploads.ticket(secret)


def test_a_ticket_ends_after_an_hour(uploads, database, alice):
    """And a control: a little earlier it works."""
    _, secret = uploads.announce(alice, "a.png", 0)
    age(database, 3500)
    assert uploads.ticket(secret)
    age(database, 200)
    with pytest.raises(NotFound):
        uploads.ticket(secret)


def test_of_two_files_for_one_ticket_the_first_is_kept(uploads, outputs, file, alice):
    """However they race; the other leaves nothing."""
    ticket, _ = uploads.announce(alice, "a.png", 100)
    start = threading.Barrier(4)

    def receive(_: int) -> bool:
        start.wait()
        try:
            uploads.receive(ticket, file, "image/png")
        except NotFound:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(receive, range(4))) == 1
    assert stored(outputs) == {uploads.find(ticket.id).blob}


def test_a_key_has_a_quota_that_a_race_cannot_break(uploads, outputs, file, alice, bob):
    """Ten files of a tenth each, of twenty at once; another key has its own, and what was refused leaves nothing."""

    def add(_: int) -> bool:
        try:
            uploads.add(alice, "a.png", file, "image/png")
        except TooManyRequests:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(20))) == 10
    assert len(stored(outputs)) == 10
    uploads.add(bob, "a.png", file, "image/png")


def test_announced_bytes_count_while_the_ticket_lives(uploads, database, file, alice):
    """Then they are free again; a file that is larger than was said is counted as it is."""
    ticket, _ = uploads.announce(alice, "a.png", 950)
    with pytest.raises(TooManyRequests):
        uploads.announce(alice, "b.png", 51)
    with pytest.raises(TooManyRequests):
        uploads.add(alice, "b.png", file, "image/png")
    uploads.receive(ticket, file, "image/png")  # 100 of the 950 that were said
    uploads.announce(alice, "c.png", 900)
    age(database, 3700)
    unsaid, _ = uploads.announce(alice, "d.png", 0)
    uploads.announce(alice, "e.png", 850)
    with pytest.raises(TooManyRequests):
        uploads.receive(unsaid, file, "image/png")


def test_a_revoked_key_uploads_nothing(uploads, keys, outputs, file, alice):
    """Its name is checked in the same transaction."""
    keys.revoke("alice")
    for refused in (lambda: uploads.announce(alice, "a", 1), lambda: uploads.add(alice, "a", file, "image/png")):
        with pytest.raises(Unauthorized):
            refused()
    assert stored(outputs) == set()


def test_sweeping_takes_the_old_and_leaves_the_young(uploads, database, outputs, file, alice):
    """A file an hour after its day, a ticket an hour after its hour; younger ones stay, and again nothing happens."""
    old = uploads.add(alice, "old.png", file, "image/png")
    age(database, DAY - 100)
    young = uploads.add(alice, "young.png", file, "image/png")
    assert uploads.find(old.id)
    age(database, 200)
    with pytest.raises(NotFound):
        uploads.find(old.id)
    assert uploads.sweep() == 0
    assert stored(outputs) == {old.blob, young.blob}
    _, secret = uploads.announce(alice, "late.png", 1)
    age(database, 3600)
    assert uploads.sweep() == 1
    assert stored(outputs) == {young.blob}
    assert uploads.find(young.id) == young
    age(database, 3700)
    assert uploads.sweep() == 1  # the ticket
    with pytest.raises(NotFound):
        uploads.ticket(secret)
    assert uploads.sweep() == 0


def test_a_file_without_a_row_is_swept_and_one_with_a_row_stays(uploads, outputs, file, alice):
    """A crash came between the two; a fresh file may be about to get its row."""
    named = uploads.add(alice, "a.png", file, "image/png")
    orphan = outputs.put_upload(file, "image/png")
    assert uploads.sweep_orphans() == 0
    assert stored(outputs) == {named.blob, orphan}
    assert uploads.sweep_orphans(0) == 1
    assert stored(outputs) == {named.blob}
    assert uploads.sweep_orphans(0) == 0


def test_a_lora_out_of_a_bucket_is_brought_here_once(database, file, tmp_path, alice):
    """Whole, and kept for as long as it is used; a folder needs no copy."""
    bucket = OutputStore("memory:///")
    uploads = UploadStore(database, bucket, kept=DAY)
    upload = uploads.add(alice, "style.safetensors", file, LORA_TYPE)
    loras = UploadedLoras(uploads, bucket, tmp_path / "cache", DAY)
    found = loras.find(alice, "style")
    assert found.read_bytes() == b"x" * 100
    assert loras.find(alice, f"https://any.example/uploads/{upload.id}.safetensors") == found
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found.name]
    folder = OutputStore(str(tmp_path / "folder"))
    uploads = UploadStore(database, folder, kept=DAY)
    newest = uploads.add(alice, "style.safetensors", file, LORA_TYPE)
    assert UploadedLoras(uploads, folder, tmp_path / "none", DAY).find(alice, "style") == folder.local(newest.blob)
    assert not (tmp_path / "none").exists()
