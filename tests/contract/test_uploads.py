"""Uploads over the wire: by ticket and PUT, and as a form; what is taken, what is refused, and what they are for."""

from __future__ import annotations

import io
import socket
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save as save_tensors

from impasto.images import decode_png
from impasto.worker.uploads import UploadedLoras

from .conftest import Stack, picture, refusal, submit

Serve = Callable[..., AbstractContextManager[Stack]]
TICKET = "/api/v3/media/uploads"
FORM = "/api/v3/media/upload/binary"
PNG = picture(96, 64, 5)
LORA = save_tensors(
    {"a.lora_down.weight": np.zeros((4, 8), np.float16), "a.lora_up.weight": np.zeros((8, 4), np.float16)}
)


def saved(kind: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (96, 64), (9, 99, 199)).save(data, kind)
    return data.getvalue()


KINDS = {
    "image/png": saved("PNG"),
    "image/jpeg": saved("JPEG"),
    "image/webp": saved("WEBP"),
    "image/gif": saved("GIF"),
    "image/bmp": saved("BMP"),
    "application/octet-stream": LORA,
}


@pytest.fixture
def anybody(stack: Stack) -> httpx.Client:
    """A client without a key."""
    return stack.client("")


def announce(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Get a ticket."""
    answer = client.post(TICKET, json={"filename": "a.png"} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["code"] == 200
    return answer.json()["data"]


def send(client: httpx.Client, data: bytes, filename: str = "a.png", path: str = FORM) -> dict[str, Any]:
    """Upload by form."""
    answer = client.post(path, files={"file": (filename, data)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["code"] == 200
    return answer.json()["data"]


def kept(stack: Stack) -> list[Path]:
    """Uploaded files on the disk, whole or not."""
    folders = (Path(stack.settings.output_root) / "uploads", stack.settings.incoming_dir)
    return sorted(file for folder in folders for file in folder.glob("*"))


# Tickets


def test_a_ticket_takes_the_file_without_a_key(stack: Stack, http: httpx.Client, anybody: httpx.Client) -> None:
    """The answer has all that the clients read; the PUT needs its headers alone; the address serves the bytes."""
    data = announce(http, size=len(PNG), content_type="image/png")
    assert set(data) == {"type", "download_url", "filename", "size", "upload"}
    assert (data["type"], data["filename"], data["size"]) == ("image", "a.png", len(PNG))
    assert data["upload"]["method"] == "PUT"
    assert data["upload"]["headers"] == {"Content-Type": "image/png"}
    assert data["download_url"].startswith(f"{stack.url}/")
    assert urlsplit(data["download_url"]).path.endswith(".png")
    refusal(anybody.get(data["download_url"]), 404)
    assert httpx.put(data["upload"]["url"], content=PNG, headers=data["upload"]["headers"]).status_code == 200
    served = anybody.get(data["download_url"])
    assert (served.status_code, served.headers["content-type"], served.content) == (200, "image/png", PNG)


def test_a_ticket_works_once(http: httpx.Client, anybody: httpx.Client) -> None:
    """A second file is refused, and the first one stays."""
    data = announce(http)
    assert anybody.put(data["upload"]["url"], content=PNG).status_code == 200
    assert "ask for another" in refusal(anybody.put(data["upload"]["url"], content=LORA), 404)
    assert anybody.get(data["download_url"]).content == PNG


def test_a_guessed_ticket_is_refused(anybody: httpx.Client) -> None:
    """Of the right form or of none."""
    for secret in ("0" * 64, "x", "%00", "é"):
        refusal(anybody.put(f"{TICKET}/{secret}", content=PNG), 404)


def test_a_ticket_needs_a_key(anybody: httpx.Client) -> None:
    """So does a form; only the PUT does not."""
    assert "Authorization" in refusal(anybody.post(TICKET, json={"filename": "a.png"}), 401)
    refusal(anybody.post(FORM, files={"file": PNG}), 401)


@pytest.mark.parametrize(
    ("fields", "ending", "kind"),
    [
        ({"filename": "a.jpeg"}, ".jpg", "image"),
        ({"filename": "A.PNG", "content_type": "image/jpeg"}, ".png", "image"),
        ({"filename": "blob", "content_type": "image/webp"}, ".webp", "image"),
        ({"filename": "style.safetensors"}, ".safetensors", "lora"),
        ({"filename": "blob"}, ".bin", "image"),
        ({"filename": "blob", "content_type": "application/octet-stream", "size": None}, ".bin", "image"),
        ({"filename": "../../etc/passwd", "content_type": "text/html\r\nX: y"}, ".bin", "image"),
    ],
)
def test_the_address_ends_as_the_file_is_announced(
    http: httpx.Client, fields: dict[str, Any], ending: str, kind: str
) -> None:
    """By its name, or else its type; neither can lead anywhere."""
    data = announce(http, **fields)
    assert data["type"] == kind
    assert data["download_url"].endswith(ending)
    assert urlsplit(data["download_url"]).path.count("/") == 2
    assert all("\r" not in value for value in data["upload"]["headers"].values())


@pytest.mark.parametrize(
    ("body", "field", "problem"),
    [
        ({}, "/filename", "is missing"),
        ({"filename": None}, "/filename", "is missing"),
        ({"filename": 7}, "/filename", "must be a string"),
        ({"filename": "a.png", "size": "12"}, "/size", "must be an integer"),
        ({"filename": "a.png", "size": True}, "/size", "must be an integer"),
        ({"filename": "a.png", "size": 1.5}, "/size", "must be an integer"),
        ({"filename": "a.png", "size": 0}, "/size", "must be between 1 and"),
        ({"filename": "a.png", "size": 10**12}, "/size", "must be between 1 and 1073741824 bytes"),
    ],
)
def test_a_wrong_announcement_is_refused_by_its_field(
    http: httpx.Client, body: dict[str, Any], field: str, problem: str
) -> None:
    """400, as every wrong field."""
    message = refusal(http.post(TICKET, json=body), 400)
    assert f'"{field}"' in message
    assert problem in message


def test_more_than_was_announced_is_refused_and_the_ticket_lives(http: httpx.Client, anybody: httpx.Client) -> None:
    """Announced lengths and streamed bodies alike; less is taken."""
    data = announce(http, size=len(PNG))
    url = data["upload"]["url"]
    assert f"at most {len(PNG)} bytes" in refusal(anybody.put(url, content=PNG + b"1"), 413)
    refusal(anybody.put(url, content=iter([PNG, b"1"])), 413)
    assert anybody.put(url, content=PNG).status_code == 200


def test_a_file_that_breaks_off_is_not_kept(stack: Stack, http: httpx.Client, anybody: httpx.Client) -> None:
    """Half a file leaves nothing, neither under its address nor on the disk, and the ticket can be tried again."""
    before = kept(stack)
    data = announce(http, size=len(PNG))
    url = urlsplit(data["upload"]["url"])
    with socket.create_connection((url.hostname, url.port)) as client:
        head = f"PUT {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(PNG)}\r\n\r\n"
        client.sendall(head.encode() + PNG[:50])
        time.sleep(0.2)
        assert len(kept(stack)) == len(before) + 1  # the control: it was coming in
    until = time.monotonic() + 5
    while kept(stack) != before and time.monotonic() < until:
        time.sleep(0.02)
    assert kept(stack) == before
    refusal(anybody.get(data["download_url"]), 404)
    assert anybody.put(data["upload"]["url"], content=PNG).status_code == 200


# Forms


@pytest.mark.parametrize("path", [FORM, "/api/v2/media/upload/binary"])
def test_a_form_takes_the_file(stack: Stack, http: httpx.Client, anybody: httpx.Client, path: str) -> None:
    """In both versions, with what the older clients read from the answer."""
    data = send(http, PNG, "fox.png", path)
    assert set(data) == {"type", "download_url", "filename", "size"}
    assert (data["type"], data["filename"], data["size"]) == ("image", "fox.png", len(PNG))
    assert data["download_url"].startswith(f"{stack.url}/")
    assert anybody.get(data["download_url"]).content == PNG


@pytest.mark.parametrize("filename", ["../../../etc/passwd", "/etc/passwd", "a\\b.png", "ключ 🔑.png", "x" * 2000, "…"])
def test_no_file_name_reaches_a_path(stack: Stack, http: httpx.Client, filename: str) -> None:
    """It is shown again, cut to a length, and is part of nothing else."""
    data = send(http, PNG, filename)
    assert data["filename"] == filename[:255]
    names = {file.name for file in kept(stack)}
    assert all(len(name) == len("0" * 32 + ".png") or name.endswith(".safetensors") for name in names)
    assert not list(Path(stack.settings.data_dir).rglob("passwd"))


def raw(parts: str, boundary: str = "XX") -> dict[str, Any]:
    """A form as bytes."""
    body = parts.replace("\n", "\r\n").encode().replace(b"<PNG>", PNG)
    return {"content": body, "headers": {"Content-Type": f'multipart/form-data; boundary="{boundary}"'}}


def test_parts_without_type_or_file_name_are_taken(http: httpx.Client, anybody: httpx.Client) -> None:
    """As blobs of scripts come, after other fields, in any case of the header."""
    form = raw(
        '--XX\nContent-Disposition: form-data; name="a"\n\nb\n--XX\ncontent-disposition: form-data; name=file\n\n'
    )
    form["content"] += PNG + b"\r\n--XX--\r\n"
    answer = http.post(FORM, **form)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert data["filename"] == "file"
    assert anybody.get(data["download_url"]).content == PNG


@pytest.mark.parametrize(
    ("request_body", "problem"),
    [
        ({"json": {"file": "x"}}, "multipart/form-data"),
        ({"content": PNG, "headers": {"Content-Type": "image/png"}}, "multipart/form-data"),
        ({"content": PNG, "headers": {"Content-Type": "multipart/form-data"}}, "multipart/form-data"),
        ({"files": {"image": PNG}}, 'Error at "/file": property "file" is missing'),
        (raw('--XX\nContent-Disposition: form-data; name="file"\n\n<PNG>'), "is cut off"),
        (raw("nonsense"), "not valid multipart/form-data"),
        ({"files": {"file": b""}}, 'Error at "/file": is empty'),
    ],
)
def test_a_form_without_a_file_is_refused(stack: Stack, http: httpx.Client, request_body: Any, problem: str) -> None:
    """400 that says what to send; nothing is kept."""
    before = kept(stack)
    assert problem in refusal(http.post(FORM, **request_body), 400)
    assert kept(stack) == before


# What is taken


@pytest.mark.parametrize("content_type", KINDS)
@pytest.mark.parametrize("name", ["a.png", "a.safetensors", "blob", "a.bin"])
def test_the_bytes_say_what_a_file_is(http: httpx.Client, anybody: httpx.Client, content_type: str, name: str) -> None:
    """Whatever its name says: it is served as what it is, to the byte, with headers that keep it harmless."""
    data = send(http, KINDS[content_type], name)
    assert data["type"] == ("lora" if KINDS[content_type] is LORA else "image")
    served = anybody.get(data["download_url"])
    assert (served.headers["content-type"], served.content) == (content_type, KINDS[content_type])
    assert served.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in served.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("data", "name", "problem"),
    [
        (
            b"<html><script>alert(1)</script>",
            "a.png",
            "is an HTML page; send a PNG, JPEG, WebP, GIF or BMP picture, or a",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg", "is an SVG drawing"),
        (b"II*\0 and so on", "a.tif", "is a TIFF"),
        (b"PK\3\4 archive/data.pkl", "style.ckpt", "is a pickle in a zip"),
        (b"\x80\2}q", "style.pt", "is a pickle"),
        (LORA[:-3], "style.safetensors", "is cut short"),
        (LORA.replace(b"F16", b"F99"), "blob", "a format that is not read"),
        (b"\0\0\0\x18ftypisom" + bytes(21_000_000), "film.mp4", "is a video"),
        (saved("BMP") + bytes(20_000_000), "large.bmp", "has 20.0 MB; at most 20 MB"),
        (saved("PNG")[:20], "half.png", "is cut off or damaged"),
    ],
)
def test_what_is_neither_picture_nor_lora_is_refused(
    stack: Stack, http: httpx.Client, data: bytes, name: str, problem: str
) -> None:
    """400 that says what it is and what to send; nothing is kept."""
    before = kept(stack)
    message = refusal(http.post(FORM, files={"file": (name, data)}), 400)
    assert message.startswith('invalid request body, Error at "/file": ')
    assert problem in message
    ticket = announce(http, filename=name)
    assert refusal(httpx.put(ticket["upload"]["url"], content=data), 400) == message
    assert kept(stack) == before


def test_limits_of_size_and_of_a_key(serve: Serve) -> None:
    """Each file, in each way; and all of a key together, where what was announced counts; another key is not hurt."""
    size = len(LORA)
    with serve(max_upload_bytes=size, upload_quota=3 * size) as stack:
        client, other = stack.client(), stack.client(stack.new_key())
        larger = LORA + bytes(70_000)
        assert f"at most {size} bytes" in refusal(client.post(FORM, files={"file": larger}), 413)
        assert "/size" in refusal(client.post(TICKET, json={"filename": "a", "size": size + 1}), 400)
        refusal(httpx.put(announce(client)["upload"]["url"], content=larger), 413)
        assert kept(stack) == []
        announced = [announce(client, size=size) for _ in range(2)]
        send(client, LORA)
        answer = client.post(FORM, files={"file": PNG})
        assert "each is deleted 7 days after" in refusal(answer, 429)
        assert int(answer.headers["retry-after"]) > 0
        refusal(client.post(TICKET, json={"filename": "a", "size": 1}), 429)
        assert httpx.put(announced[0]["upload"]["url"], content=LORA).status_code == 200
        assert len(kept(stack)) == 2
        send(other, PNG)


def test_a_large_file_comes_in_and_goes_out_in_parts(stack: Stack, http: httpx.Client) -> None:
    """A LoRA of 40 MB is longer than a JSON body may be; a range of it is served alone."""
    large = save_tensors({"a.lora_down.weight": np.zeros((4, 5_000_000), np.float16)})
    data = announce(http, filename="large.safetensors", size=len(large))
    assert httpx.put(data["upload"]["url"], content=large, timeout=60).status_code == 200
    served = httpx.get(data["download_url"], timeout=60)
    assert served.content == large
    assert int(served.headers["content-length"]) == len(large)
    part = httpx.get(data["download_url"], headers={"Range": "bytes=0-99"})
    assert (part.status_code, part.content) == (206, large[:100])


# What can be done with them


@pytest.mark.parametrize("spelling", ["as given", "another host", "path"])
def test_an_upload_can_be_the_start_picture(stack: Stack, http: httpx.Client, spelling: str) -> None:
    """Read here, whatever host the address names: the one it is given under is private, and nothing is dialled."""
    url = send(http, PNG)["download_url"]
    path = urlsplit(url).path
    image = {"as given": url, "another host": f"https://images.example{path}?x=1", "path": path}[spelling]
    job = stack.store.get(submit(http, image=image, mask_image=url)["id"])
    found = decode_png(stack.outputs.get_input(job.input["pictures"]["image"]))
    assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(PNG))))
    assert "mask_image" in job.input["pictures"]


def test_an_upload_that_is_no_picture_or_not_here_is_refused(stack: Stack, http: httpx.Client) -> None:
    """With the field's name."""
    lora = send(http, LORA, "style.safetensors")["download_url"]
    body = {"prompt": "x", "image": lora}
    assert 'Error at "/image": is an uploaded LoRA' in refusal(http.post("/api/v3/wavespeed-ai/sdxl", json=body), 400)
    body = {"prompt": "x", "image": f"{stack.url}/uploads/{'0' * 32}.png"}
    assert "has no such file any more" in refusal(http.post("/api/v3/wavespeed-ai/sdxl", json=body), 400)


def test_a_lora_is_found_by_its_owner_alone(stack: Stack, http: httpx.Client) -> None:
    """By its address on any host, its name, or its name without the ending; the newest of a name."""
    other = stack.client(stack.new_key())
    newer = save_tensors({"b.lora_down.weight": np.ones((4, 8), np.float16)})
    send(http, LORA, "mine.safetensors")
    url = send(http, newer, "mine.safetensors")["download_url"]
    send(http, PNG, "mine.png")
    me, them = (stack.store.get(submit(client, loras=[{"path": url}])["id"]).key_id for client in (http, other))
    loras = UploadedLoras.of(stack.settings, stack.store.engine, stack.outputs)
    path = urlsplit(url).path
    for name in (url, path, f"https://elsewhere.example{path}", "mine", "mine.safetensors"):
        found = loras.find(me, name)
        assert found is not None
        assert found.read_bytes() == newer
        assert loras.find(them, name) is None
    for name in ("mine.png", "owner/name", f"/uploads/{'0' * 32}.safetensors", "../mine"):
        assert loras.find(me, name) is None


def archive(*names: str) -> bytes:
    """A tar with a LoRA under each of these names."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(LORA)
            tar.addfile(info, io.BytesIO(LORA))
    return packed.getvalue()


def test_an_archive_of_cog_sdxl_is_a_lora(stack: Stack, http: httpx.Client) -> None:
    """As a form and by ticket; any other archive is refused, with what to do."""
    data = archive("lora.safetensors")
    sent = send(http, data, "trained_model.tar")
    assert (sent["type"], sent["filename"]) == ("lora", "trained_model.tar")
    assert announce(http, filename="trained_model.tar", size=len(data))["type"] == "lora"
    job = stack.store.get(submit(http, loras=[{"path": sent["download_url"]}])["id"])
    found = UploadedLoras.of(stack.settings, stack.store.engine, stack.outputs).find(job.key_id, "trained_model.tar")
    assert found is not None
    assert found.read_bytes() == data
    refused = http.post(FORM, files={"file": ("trained_model.tar", archive("model.safetensors"))})
    assert "no lora.safetensors in it; unpack it and give the .safetensors" in refusal(refused, 400)


@pytest.fixture
def shortlived(serve: Serve) -> Iterator[Stack]:
    """A service that keeps uploads for less than two seconds."""
    with serve(upload_seconds=1.5) as stack:
        yield stack


def test_an_upload_expires(shortlived: Stack) -> None:
    """After its time nobody finds it; its file goes an hour later, for whoever found it just before."""
    client = shortlived.client()
    url = send(client, PNG)["download_url"]
    assert client.get(url).status_code == 200
    assert client.get(url).headers["cache-control"] == "private, max-age=1, immutable"
    time.sleep(1.6)
    assert "may have been deleted" in refusal(client.get(url), 404)
    body = {"prompt": "x", "image": url}
    refusal(client.post("/api/v3/wavespeed-ai/sdxl", json=body), 400)


@pytest.mark.parametrize("name", ["", "x", f"{'0' * 31}.png", f"{'0' * 32}.png", f"{'0' * 32}", "..%2f..%2fimpasto.db"])
def test_no_other_address_leads_to_a_file(anybody: httpx.Client, name: str) -> None:
    """One error body for all."""
    refusal(anybody.get(f"/uploads/{name}"), 404)


def test_the_official_client_uploads(stack: Stack, tmp_path: Path) -> None:
    """wavespeed 2.x announces, sends, and passes the address on."""
    import wavespeed

    file = tmp_path / "fox.png"
    file.write_bytes(PNG)
    client = wavespeed.Client(api_key=stack.key, base_url=stack.url)
    url = client.upload(str(file))
    assert httpx.get(url).content == PNG
    submit(stack.client(), image=url)
