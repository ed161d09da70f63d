"""Start pictures by their address: this service's own, and other hosts' through the guard."""

import io
import time

import anyio
import pytest
from PIL import Image

from impasto.api.pictures import FETCHES, PictureAt, PictureSource, to_mask_png, to_png
from impasto.config import Settings
from impasto.errors import InvalidInput
from impasto.images import decode_png
from impasto.jobs.outputs import OutputStore
from tests.sites import Page, Web, redirect, running


def picture(kind="PNG", size=(64, 48)):
    data = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(data, kind)
    return data.getvalue()


@pytest.fixture
def web():
    with running(Web()) as server:
        server.pages["/a.png"] = Page(picture())
        yield server


@pytest.fixture
def outputs(tmp_path):
    return OutputStore(str(tmp_path / "outputs"))


@pytest.fixture
def source(tmp_path, web, outputs):
    reach = {"fetch_allow": ["127.0.0.1"], "fetch_http": True, "fetch_ports": [web.server_port]}
    return PictureSource.of(Settings(data_dir=tmp_path, **reach), outputs)


@pytest.fixture
def guarded(tmp_path, outputs):
    """As a service is that allows nothing special."""
    return PictureSource.of(Settings(data_dir=tmp_path), outputs)


def refusal(source, url):
    with pytest.raises(InvalidInput) as error:
        source.read(PictureAt(url, "image"))
    assert error.value.field == "image"
    return error.value.problem


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_fetched_and_encoded_anew(source, web, kind):
    """Through redirects, whatever type the server claims; nobody's own bytes are kept."""
    web.pages |= {"/p": redirect("/q"), "/q": Page(picture(kind), headers={"Content-Type": "text/html"})}
    png = source.read(PictureAt(f"{web.url}/p", "image"))
    assert png != picture(kind) and png.startswith(b"\x89PNG")
    assert decode_png(png).size == (64, 48)
    assert decode_png(source.read(PictureAt(f"{web.url}/p", "mask_image", mask=True))).mode == "L"


@pytest.mark.parametrize("text", ["https://h/x", " HTTP://h/x", "https:/broken", "http:h"])
def test_addresses_are_told_from_pictures(text):
    """Whatever begins like one; base64 and data URIs are not taken for one."""
    assert PictureAt.of(text, "image") == PictureAt(text.strip(), "image")
    for other in ("data:image/png;base64,aaaa", "aaaa", "/outputs/x", "httpaaaa", ""):
        assert PictureAt.of(other, "image") is None


def test_our_own_results_are_read_without_dialling(guarded, outputs):
    """Whatever host the address names: the service may be known by many, and may reach none of them."""
    blob = outputs.put("0" * 32, 1, 0, picture(), "image/png")
    for base in ("http://127.0.0.1:8000", "https://pictures.example", "http://10.0.0.1/some/prefix", ""):
        at = PictureAt.of(f"{base}/outputs/{blob}", "image")
        assert at is not None
        assert decode_png(guarded.read(at)).size == (64, 48)


def test_a_start_picture_of_somebody_else_is_no_result(guarded, outputs):
    """Only finished pictures have addresses."""
    key = outputs.put_input(picture())
    assert PictureAt.of(f"/outputs/{key}", "image") is None
    assert "must be https" in refusal(guarded, f"http://127.0.0.1/outputs/{key}")
    unknown = f"https://127.0.0.1/outputs/{'0' * 32}/1-{'0' * 32}/0.png"
    assert "could not be reached" in refusal(guarded, unknown)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (Page(b"<!doctype html><p>Log in"), "is an HTML page"),
        (Page(b""), "is empty"),
        (Page(picture()[:100]), "is cut off or damaged"),
        (Page(picture(), cut_once=50), "broke off before its end"),
        (Page(b"", 404), "was not found there"),
        (Page(b"", 403), "needs a login there"),
        (Page(b"", 429, {"Retry-After": "9"}), "try again in 9 s"),
        (Page(bytes(20_000_001)), "is too large: at most 20 MB"),
        (redirect("file:///etc/passwd"), "redirects to an address that"),
    ],
)
def test_what_cannot_be_had_is_told(source, web, page, words):
    """With the field and the remedy."""
    web.pages["/x"] = page
    assert words in refusal(source, f"{web.url}/x")


def test_addresses_are_guarded(guarded, web):
    """The very server of the other tests, without the allowance: it is never asked."""
    problem = refusal(guarded, f"{web.url}/a.png")
    assert problem.startswith("is a URL that must be https") and "data URI" in problem
    assert "could not be reached" in refusal(guarded, "https://169.254.169.254/latest/meta-data")
    assert web.reached == 0


def test_offline_says_so(tmp_path, outputs, web):
    """And fetches nothing."""
    source = PictureSource.of(Settings(data_dir=tmp_path, offline=True, fetch_allow=["127.0.0.1"]), outputs)
    assert "this server fetches nothing" in refusal(source, f"{web.url}/a.png")
    assert web.reached == 0


def test_a_slow_server_is_given_up(source, web, monkeypatch):
    """At the limit, though bytes keep dripping."""
    monkeypatch.setattr("impasto.api.pictures.FETCH_SECONDS", 0.5)
    web.pages["/x"] = Page(picture(), drip=0.05)
    began = time.monotonic()
    assert "did not arrive in time" in refusal(source, f"{web.url}/x")
    assert time.monotonic() - began < 2


def test_slow_servers_do_not_take_the_services_threads(source, web, monkeypatch):
    """More of them than may be fetched at once: other blocking work goes on."""
    monkeypatch.setattr("impasto.api.pictures.FETCH_SECONDS", 1.5)
    web.pages["/x"] = Page(picture(), drip=0.05)
    given = {"image": PictureAt(f"{web.url}/x", "image")}

    async def one():
        with pytest.raises(InvalidInput):
            await source.fetched(given)

    async def scene():
        anyio.to_thread.current_default_thread_limiter().total_tokens = 2
        async with anyio.create_task_group() as tasks:
            for _ in range(FETCHES):
                tasks.start_soon(one)
            await anyio.sleep(0.3)
            began = time.monotonic()
            await anyio.to_thread.run_sync(lambda: None)
            assert time.monotonic() - began < 0.5

    anyio.run(scene)


def test_given_pictures_pass_through(source):
    """Those that came in the body are bytes already."""

    async def scene():
        return await source.fetched({"image": b"png"})

    assert anyio.run(scene) == {"image": b"png"}


def test_pictures_in_the_body_are_read_as_before():
    """Data URI and base64, picture and mask."""
    import base64

    text = base64.b64encode(picture()).decode()
    assert decode_png(to_png(text, "image")).mode == "RGB"
    assert decode_png(to_mask_png(f"data:image/png;base64,{text}", "mask_image")).mode == "L"
