"""What the store of finished pictures promises."""

from __future__ import annotations

import re

import pytest

from impasto.errors import NotFound, Unavailable
from impasto.jobs import outputs as module
from impasto.jobs.outputs import CHUNK_BYTES, EXTENSIONS, OutputStore, content_type_of

JOB = "0123456789abcdef0123456789abcdef"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def outputs(tmp_path):
    return OutputStore(str(tmp_path / "data" / "outputs"))


def test_what_was_put_comes_back(outputs):
    """Byte for byte, empty files and large ones too."""
    for data in (PNG, b"", PNG * 40_000):
        assert outputs.get(outputs.put(JOB, 1, 0, data, "image/png")) == data


def test_the_folder_is_made_when_it_is_missing(tmp_path):
    """A fresh data folder needs no preparation."""
    OutputStore(str(tmp_path / "a" / "b")).put(JOB, 1, 0, PNG, "image/png")
    assert len(list((tmp_path / "a" / "b").rglob("*.png"))) == 1


def test_a_relative_folder_works(tmp_path, monkeypatch):
    """``--data-dir data`` is what people type."""
    monkeypatch.chdir(tmp_path)
    outputs = OutputStore("data")
    assert outputs.get(outputs.put(JOB, 1, 0, PNG, "image/png")) == PNG


def test_a_url_works_like_a_folder(tmp_path):
    """Object stores and folders share every line but one: only the former keep a content type."""
    (tmp_path / "files").mkdir()
    for root in ("memory:///", (tmp_path / "files").as_uri()):
        outputs = OutputStore(root)
        blob = outputs.put(JOB, 1, 0, PNG, "image/png")
        assert outputs.get(blob) == PNG
        outputs.delete([blob])
        with pytest.raises(NotFound):
            outputs.get(blob)


@pytest.mark.parametrize(("content_type", "extension"), EXTENSIONS.items())
def test_a_name_tells_job_attempt_position_and_type(outputs, content_type, extension):
    """Sweeping a dead attempt's files needs no database."""
    blob = outputs.put(JOB, 3, 2, PNG, content_type)
    assert re.fullmatch(rf"{JOB}/3-[0-9a-f]{{32}}/2\.{extension}", blob)
    assert content_type_of(blob) == content_type


def test_names_cannot_be_guessed(outputs):
    """The address is the permission: the same picture put twice has 128 fresh random bits in its name."""
    assert len({outputs.put(JOB, 1, 0, PNG, "image/png") for _ in range(20)}) == 20


def test_a_file_is_never_written_over(outputs, monkeypatch):
    """Even if the random part came out the same, the first picture stays."""
    monkeypatch.setattr(module.secrets, "token_hex", lambda n: "a" * 2 * n)
    blob = outputs.put(JOB, 1, 0, b"first", "image/png")
    with pytest.raises(Unavailable):
        outputs.put(JOB, 1, 0, b"second", "image/png")
    assert outputs.get(blob) == b"first"


def test_deleted_files_are_gone_and_the_rest_stay(outputs, tmp_path):
    """Empty folders go as well; deleting twice is no error."""
    gone, kept = (outputs.put(JOB, attempt, 0, PNG, "image/png") for attempt in (1, 2))
    outputs.delete([gone])
    outputs.delete([gone])
    assert outputs.get(kept) == PNG
    with pytest.raises(NotFound, match="may have been deleted"):
        outputs.get(gone)
    assert len(list((tmp_path / "data" / "outputs" / JOB).iterdir())) == 1


def test_a_start_picture_comes_back_by_its_key(outputs):
    """Stored under a name that cannot be guessed, and gone after deletion."""
    keys = {outputs.put_input(PNG) for _ in range(20)}
    assert len(keys) == 20
    key = keys.pop()
    assert re.fullmatch(r"inputs/[0-9a-f]{32}\.png", key)
    assert outputs.get_input(key) == PNG
    outputs.delete([key])
    outputs.delete([key])
    with pytest.raises(NotFound, match="may have been deleted"):
        outputs.get_input(key)
    assert all(outputs.get_input(other) == PNG for other in keys)


def test_a_start_picture_is_never_written_over(outputs, monkeypatch):
    """Even if the key came out the same."""
    monkeypatch.setattr(module.secrets, "token_hex", lambda n: "a" * 2 * n)
    key = outputs.put_input(b"first")
    with pytest.raises(Unavailable):
        outputs.put_input(b"second")
    assert outputs.get_input(key) == b"first"


def test_a_start_picture_is_not_served_as_a_finished_one(outputs):
    """What reads finished pictures refuses the key of a start picture, and the other way round."""
    key, blob = outputs.put_input(PNG), outputs.put(JOB, 1, 0, PNG, "image/png")
    for refuse, name in ((outputs.get, key), (content_type_of, key), (outputs.get_input, blob)):
        with pytest.raises(NotFound, match="no such file"):
            refuse(name)


@pytest.mark.parametrize("kept", ["folder", "bucket"])
def test_an_upload_is_stored_and_read_in_parts(tmp_path, kept):
    """Whole or any part of it; gone after deletion, in every way to read it."""
    outputs = OutputStore(str(tmp_path / "outputs") if kept == "folder" else "memory:///")
    file = tmp_path / "file"
    file.write_bytes(PNG * 20_000)
    name = outputs.put_upload(file, "image/gif")
    assert re.fullmatch(r"uploads/[0-9a-f]{32}\.gif", name)
    whole = PNG * 20_000
    assert outputs.get_upload(name) == whole
    assert outputs.size(name) == len(whole)
    parts = list(outputs.chunks(name, 7, len(whole)))
    assert b"".join(parts) == whole[7:]
    assert max(map(len, parts)) == CHUNK_BYTES
    assert list(outputs.chunks(name, 3, 3)) == []
    local = outputs.local(name)
    assert (local is not None and local.read_bytes() == whole) if kept == "folder" else local is None
    outputs.delete([name])
    for gone in (outputs.get_upload, outputs.size, lambda name: list(outputs.chunks(name, 0, 1))):
        with pytest.raises(NotFound, match="may have been deleted"):
            gone(name)


def test_files_are_listed_by_kind_and_age(outputs, tmp_path):
    """A fresh one is not among those that were written a minute ago, and nothing but files of ours is listed."""
    (tmp_path / "file").write_bytes(PNG)
    picture, start = outputs.put(JOB, 1, 0, PNG, "image/png"), outputs.put_input(PNG)
    upload = outputs.put_upload(tmp_path / "file", "image/png")
    (tmp_path / "data" / "outputs" / "uploads" / "readme.txt").write_text("somebody's own")
    shelves = {"inputs/": start, "uploads/": upload, f"{JOB}/": picture}
    for shelf, name in shelves.items():
        assert list(outputs.older(shelf, 0)) == [name]
        assert list(outputs.older(shelf, 60)) == []
    assert list(outputs.older(f"{'0' * 32}/", 0)) == []
    with pytest.raises(NotFound):
        list(outputs.older("../", 0))


HOSTILE = [
    "",
    "/etc/passwd",
    "../outputs.png",
    f"{JOB}/1-{JOB}/../../../secret.png",
    f"{JOB}/1-{JOB}/0.png/",
    f"{JOB}/1-{JOB}/0.exe",
    f"{JOB}/1-{JOB}/0.png\n",
    f"{JOB}/1-{JOB}/0.png\0",
    f"{JOB}//1-{JOB}/0.png",
    f"{JOB.upper()}/1-{JOB}/0.png",
    f"{JOB}/1-{JOB}/٠.png",  # a digit, but not one of ours
    f"{JOB}%2f1-{JOB}%2f0.png",
    "inputs/../../secret.png",
    f"inputs/../inputs/{JOB}.png",
    f"inputs/{JOB}.png\n",
    f"inputs/{JOB}.svg",
    f"uploads/{JOB}.exe",
    f"uploads/../uploads/{JOB}.png",
    f"uploads/{JOB}.png\n",
    "\ud800",
]


@pytest.mark.parametrize("blob", HOSTILE)
def test_only_names_of_our_making_reach_the_disk(outputs, tmp_path, blob):
    """No text from an address becomes a path: reading, deleting and typing all refuse it."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    readers = (outputs.get, outputs.get_input, outputs.get_upload, outputs.size, outputs.local, content_type_of)
    for refuse in (*readers, lambda name: outputs.delete([name]), lambda name: list(outputs.chunks(name, 0, 1))):
        with pytest.raises(NotFound, match="no such file"):
            refuse(blob)
    assert (tmp_path / "secret.png").exists()


@pytest.mark.parametrize("job_id", ["../../x", "a/b", "", JOB + "0"])
def test_a_job_id_cannot_lead_out_of_the_folder(outputs, job_id):
    """Writing checks the whole name as reading does."""
    with pytest.raises(NotFound):
        outputs.put(job_id, 1, 0, PNG, "image/png")


def test_a_type_that_is_no_picture_is_refused(outputs):
    """Nothing but pictures is ever served from here."""
    with pytest.raises(KeyError):
        outputs.put(JOB, 1, 0, b"<script>", "text/html")


def test_a_missing_file_looks_like_any_missing_thing(outputs):
    """A well-formed name that was never given out is a plain 404 without a path in the message."""
    with pytest.raises(NotFound) as caught:
        outputs.get(f"{JOB}/1-{JOB}/0.png")
    assert "/" not in str(caught.value)
