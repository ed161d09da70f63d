"""The page at ``/`` in a real browser, against the real service with a real worker: what a person does, and sees."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import wavespeed
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Error, Route, expect, sync_playwright

from tests.e2e.conftest import KEY, Served, ended, poll
from tests.e2e.visit import CHROMIUM, FLAGS, PATIENCE, WIDE, Visit, accessible_name, from_uri, png, png_file

LORAS = Path(__file__).resolve().parents[2] / "src/impasto/models/builtin/loras"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


Start = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service whose model draws patterns: for everything but the picture itself."""
    served = Served(tmp_path_factory.mktemp("fake"), "--model", "fake", IMPASTO_FAKE_STEP_SECONDS="0.05")
    yield served
    served.stop()


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with the model that ships, and its LoRAs under their own names."""
    folder = tmp_path_factory.mktemp("builtin")
    (folder / "loras").mkdir()
    for file in LORAS.glob("*.safetensors"):
        shutil.copy(file, folder / "loras")
    served = Served(folder)
    served.wait_for(re.compile("taking jobs"), 180)
    yield served
    served.stop()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Start]:
    """Open the page in a fresh browser profile; at the end, no other host was asked and nothing was complained of."""
    opened: list[tuple[Visit, BrowserContext, tuple[str, ...]]] = []

    def start(served: Served, *, key: bool = True, refusals: tuple[str, ...] = (), **profile: Any) -> Visit:
        secret = served.wait_for(KEY)
        context = browser.new_context(viewport=profile.pop("viewport", WIDE), **profile)
        context.set_default_timeout(PATIENCE)
        if key:
            context.add_init_script(f"localStorage.setItem('impasto.key', '{secret}')")
        visit = Visit(context.new_page(), served.url, secret)
        visit.page.on("request", lambda request: visit.requests.append(request))
        visit.page.on("console", lambda m: visit.complaints.append(m.text) if m.type in ("error", "warning") else None)
        visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        opened.append((visit, context, refusals))
        visit.page.goto(served.url)
        visit.page.locator("html[data-ready]").wait_for()
        return visit

    yield start
    for visit, context, refusals in opened:
        context.close()
        elsewhere = [r.url for r in visit.requests if not r.url.startswith((visit.url + "/", "data:", "blob:"))]
        assert elsewhere == []
        assert [text for text in visit.complaints if not any(status in text for status in refusals)] == []


def test_nothing_inline_or_foreign_may_run_and_only_the_page_is_at_the_root(fake):
    """The policy allows own files alone; other methods, other names and paths out of the folder lead nowhere."""
    with httpx.Client(base_url=fake.url, trust_env=False) as client:
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "unsafe" not in policy and "default-src 'none'" in policy and "script-src 'self';" in policy
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|https?://", page.text)
        script = client.get("/static/main.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert script.headers["content-security-policy"] == policy
        assert client.get("/static/main.js", headers={"If-None-Match": script.headers["etag"]}).status_code == 304
        assert client.post("/").status_code == 405
        assert client.post("/static/main.js").status_code == 405
        for name in ("nothing.js", "..%2fplayground.py", "..%2f..%2fapp.py"):
            answer = client.get(f"/static/{name}", headers={"Accept": "*/*"})
            assert answer.status_code == 404 and set(answer.json()) == {"code", "message", "error"}
        assert client.get("/api/v3/nothing").status_code == 401, "the API's own routes are as they were"


def test_a_picture_is_made_by_clicking(fake, visit):
    """Key, prompt, click: progress goes up, a preview is shown, then the picture, its seed and a download."""
    at = visit(fake, key=False)
    expect(at.page.locator("#key-section")).to_have_attribute("open", "")
    at.page.get_by_label("API key", exact=True).fill(at.key)
    at.paint("a red fox", steps=30)

    bar = at.page.get_by_role("progressbar")
    expect(bar).to_be_visible()
    expect(at.page.locator("#progress-step")).to_have_text(re.compile(r"Step \d+ of 30"))
    expect(at.page.locator("img.preview")).to_be_visible()
    expect(bar).not_to_have_attribute("aria-valuenow", "0")
    expect(at.works()).to_have_count(1)
    assert at.works().evaluate("image => [image.naturalWidth, image.naturalHeight]") == [512, 512]
    expect(at.page.locator("#announce")).to_contain_text("The picture is finished")
    expect(at.page.locator("#progress")).to_be_hidden()

    with at.page.expect_download() as download:
        at.page.get_by_role("link", name="Download").click()
    assert Image.open(io.BytesIO(download.value.path().read_bytes())).size == (512, 512)
    assert download.value.suggested_filename.endswith(".png")
    seed = int(re.search(r"\d+", at.page.locator(".seed").inner_text())[0])
    at.page.get_by_role("button", name="Use the last picture's seed again").click()
    expect(at.page.locator("#field-seed")).to_have_value(str(seed))
    assert at.page.evaluate("localStorage.getItem('impasto.key')") == at.key


def test_a_picture_from_the_shipped_model_with_a_lora_and_its_report(builtin, visit):
    """Real previews while it is drawn; afterwards what the LoRA did, and its trigger word goes into the prompt."""
    at = visit(builtin)
    expect(at.page.get_by_label("Width in pixels")).to_have_value("512")
    at.open_group("LoRAs")
    at.page.get_by_role("button", name="Add a LoRA").click()
    at.page.get_by_label("LoRA 1", exact=True).fill("line-art")
    at.page.get_by_label("Scale of LoRA 1").fill("0.8")
    at.paint("a red fox on a blue background", steps=8)
    expect(at.page.locator("img.preview")).to_be_visible()
    shown = at.page.locator("img.preview").evaluate("image => [image.naturalWidth, image.src.slice(0, 23)]")
    assert shown[0] > 0 and shown[1] == "data:image/jpeg;base64,"
    expect(at.works()).to_have_count(1, timeout=60_000)

    assert at.bodies()[-1]["loras"] == [{"path": "line-art", "scale": 0.8}]
    report = at.page.locator(".lora-report")
    expect(report).to_contain_text("line-art")
    expect(report.locator(".applied")).to_have_text(re.compile(r"^[1-9]\d* modules applied"))
    words = report.locator(".word")
    if words.count():
        word = words.first.inner_text()
        words.first.click()
        expect(at.page.get_by_label("Prompt", exact=True)).to_have_value(f"a red fox on a blue background, {word}")


def test_a_mask_is_painted_and_sent_white_on_black(fake, visit):
    """Strokes by mouse, one erased, one undone: the request has the mask, and the service keeps what is black."""
    at = visit(fake)
    at.open_group("Start picture")
    at.page.locator("input[type=file]").set_input_files(png_file())
    at.page.get_by_role("button", name="Paint a mask").click()
    canvas = at.page.locator("#mask-canvas")
    box = canvas.bounding_box()

    def stroke(x1: float, y1: float, x2: float, y2: float) -> None:
        at.page.mouse.move(box["x"] + x1 * box["width"], box["y"] + y1 * box["height"])
        at.page.mouse.down()
        at.page.mouse.move(box["x"] + x2 * box["width"], box["y"] + y2 * box["height"], steps=4)
        at.page.mouse.up()

    stroke(0.2, 0.25, 0.8, 0.25)
    stroke(0.2, 0.75, 0.8, 0.75)
    at.page.get_by_role("button", name="Undo").click()
    at.page.get_by_role("button", name="Erase").click()
    stroke(0.5, 0.15, 0.5, 0.35)
    at.page.get_by_role("button", name="Use the mask").click()
    expect(at.page.get_by_role("button", name="Edit the mask")).to_be_visible()
    at.set("strength", "1")
    at.paint("a boat")
    expect(at.works()).to_have_count(1)

    body = at.bodies()[-1]
    assert base64.b64decode(body["image"].split(",")[1]) == png()
    mask = from_uri(body["mask_image"])
    assert mask.size == (512, 512)
    places = {(128, 128): 255, (384, 128): 255, (256, 128): 0, (256, 384): 0, (5, 5): 0}
    assert {place: mask.convert("L").getpixel(place) for place in places} == places
    drawn = Image.open(io.BytesIO(httpx.get(at.works().get_attribute("src"), trust_env=False).content))
    assert drawn.getpixel((5, 5)) == drawn.getpixel((256, 384)) == (40, 90, 160) != drawn.getpixel((128, 128))


def test_a_mask_is_painted_by_touch_and_by_keys(fake, visit):
    """A finger paints; so do the arrow keys with space; clearing takes the mask away."""
    at = visit(fake, viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    at.open_group("Start picture")
    at.page.locator("input[type=file]").set_input_files(png_file(600, 300))
    at.page.get_by_role("button", name="Paint a mask").click()
    canvas = at.page.locator("#mask-canvas")
    box = canvas.bounding_box()
    touch = at.page.context.new_cdp_session(at.page)
    for kind, share in (("touchStart", 0.1), ("touchMove", 0.3), ("touchEnd", None)):
        place = {"x": box["x"] + (share or 0) * box["width"], "y": box["y"] + box["height"] / 2}
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [] if share is None else [place]})
    painted = "canvas => canvas.getContext('2d').getImageData(...{}, 1, 1).data[3]"
    assert canvas.evaluate(painted.format("[120, 150]")) == 255
    assert canvas.evaluate(painted.format("[500, 150]")) == 0

    canvas.focus()
    for _ in range(40):
        canvas.press("Shift+ArrowRight")
    canvas.press("Space")
    assert canvas.evaluate(painted.format("[598, 150]")) == 255
    at.page.get_by_role("button", name="Clear").click()
    assert canvas.evaluate(painted.format("[120, 150]")) == 0
    at.page.get_by_role("button", name="Use the mask").click()
    expect(at.page.get_by_role("button", name="Paint a mask")).to_be_visible()


def test_a_result_becomes_the_start_picture(fake, visit):
    """By its address, which the service reads without a network; a dropped, then a pasted file takes its place."""
    at = visit(fake)
    at.paint("a boat")
    expect(at.works()).to_have_count(1)
    at.page.get_by_role("button", name="Use as start picture").click()
    expect(at.page.locator(".start-picture img")).to_be_visible()
    at.page.locator("#run").click()
    expect(at.page.locator("#announce")).to_have_text(re.compile("queue|percent"))
    expect(at.works()).to_have_count(1)
    assert at.bodies()[-1]["image"].startswith(f"{at.url}/outputs/")

    hand_over = """([kind, encoded]) => {
        const bytes = Uint8Array.from(atob(encoded), (each) => each.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], 'given.png', { type: 'image/png' }));
        const options = { bubbles: true, cancelable: true, dataTransfer, clipboardData: dataTransfer };
        const event = kind === 'drop' ? new DragEvent(kind, options) : new ClipboardEvent(kind, options);
        document.body.dispatchEvent(event);
    }"""
    for kind, width in (("drop", 640), ("paste", 704)):
        at.page.evaluate(hand_over, [kind, base64.b64encode(png(width, 512)).decode()])
        expect(at.page.locator(".start-side")).to_contain_text(f"{width} × 512")


def test_a_job_is_cancelled(fake, visit):
    """Esc while it runs: the page says so, and the job is over on the server."""
    at = visit(fake)
    at.paint("a slow boat", steps=50)
    expect(at.page.locator("#progress-step")).to_have_text(re.compile("Step"))
    at.page.keyboard.press("Escape")
    expect(at.page.locator("#verdict")).to_have_text("Cancelled.")
    expect(at.page.locator("#run")).to_be_visible()
    listed = at.page.locator(".work-item").first
    expect(listed).to_have_attribute("data-state", "cancelled")
    job = fake.api(at.key).get(f"/api/v3/predictions/{listed.get_attribute('data-id')}").json()["data"]
    assert job["status"] == "failed" and job["error"].startswith("cancelled")


def test_an_error_is_shown_at_its_field(fake, visit):
    """What the service says of a field stands at that field, opened, marked and focused; typing clears it."""
    at = visit(fake, refusals=("400",))
    at.paint("a boat")
    expect(at.works()).to_have_count(1)
    at.paint("a boat", steps=51)
    error = at.page.locator("#error-num_inference_steps")
    expect(error).to_have_text(re.compile("between 1 and 50"))
    box = at.page.locator("#field-num_inference_steps")
    expect(box).to_be_focused()
    expect(error).to_be_in_viewport(ratio=1)
    expect(at.works()).to_have_count(1)
    expect(box).to_have_attribute("aria-invalid", "true")
    assert "error-num_inference_steps" in box.get_attribute("aria-describedby")
    box.fill("4")
    expect(error).to_be_hidden()

    at.open_group("LoRAs")
    for name in ("fox", ""):
        at.page.get_by_role("button", name="Add a LoRA").click()
        at.page.locator(".lora input[type=text]").last.fill(name)
    at.page.locator("#run").click()
    expect(at.page.locator(".lora").nth(1).locator(".error")).to_contain_text("empty")
    expect(at.page.locator(".lora").nth(0).locator(".error")).to_be_hidden()
    expect(at.page.get_by_label("LoRA 2", exact=True)).to_be_focused()


def test_a_wrong_key_is_told_at_the_key(fake, visit):
    """401 stands at the key field; the right key then lists what it made."""
    at = visit(fake, key=False, refusals=("401",))
    at.page.get_by_label("Prompt", exact=True).fill("a boat")
    at.page.locator("#run").click()
    expect(at.page.locator("#error-key")).to_contain_text("A key is needed")
    at.page.get_by_label("API key", exact=True).fill("0" * 64)
    at.page.locator("#run").click()
    expect(at.page.locator("#error-key")).to_contain_text("unknown")
    expect(at.page.get_by_label("API key", exact=True)).to_have_attribute("aria-invalid", "true")
    at.page.get_by_label("API key", exact=True).fill(at.key)
    at.page.keyboard.press("Tab")
    expect(at.page.locator("#error-key")).to_be_hidden()
    expect(at.page.locator("#key-note")).to_have_text(f"…{at.key[-4:]}")


def test_what_an_old_key_is_told_late_says_nothing_of_the_new_one(fake, visit):
    """The list asked for with the wrong key is refused after the one of the right key has come."""
    at = visit(fake, key=False, refusals=("401",))
    at.page.get_by_label("Prompt", exact=True).fill("a boat")
    late = []

    def hold_back(route):
        if at.key in route.request.headers.get("authorization", ""):
            return route.continue_()
        return late.append(route)

    at.page.route("**/api/v3/predictions", hold_back)
    for key in ("0" * 64, at.key):
        with at.page.expect_request("**/api/v3/predictions"):
            at.page.get_by_label("API key", exact=True).fill(key)
            at.page.keyboard.press("Tab")
    expect(at.page.locator("#gallery-note")).to_have_text(re.compile("Nothing yet|^$"))
    with at.page.expect_response(lambda response: response.status == 401):
        late[0].continue_()
    at.page.evaluate("() => new Promise((done) => setTimeout(done, 200))")
    expect(at.page.locator("#error-key")).to_be_hidden()
    expect(at.page.locator("#gallery-note")).not_to_contain_text("not valid")


def test_the_gallery_shows_and_reloads_and_deletes(fake, visit):
    """A work brings its settings and seed back, the same request makes the same picture; a second click deletes."""
    at = visit(fake)
    sent = {"prompt": "a quiet harbour", "size": "768*512", "num_inference_steps": 3, "guidance_scale": 7.5}
    sent |= {"num_images": 2}
    api = fake.api(at.key)
    made = api.post("/api/v3/wavespeed-ai/sdxl-lora", json=sent | {"negative_prompt": "fog"}).json()["data"]
    made = poll(api, made["id"], ended)
    at.page.get_by_role("button", name="Load the gallery again").click()
    item = at.page.locator(f".work-item[data-id='{made['id']}']")
    item.locator("img").wait_for()
    item.locator(".open-work").click()
    expect(at.works()).to_have_count(2)
    expect(at.page.get_by_label("Prompt", exact=True)).to_have_value("a quiet harbour")
    expect(at.page.get_by_label("Negative prompt")).to_have_value("fog")
    expect(at.page.locator("#field-guidance_scale")).to_have_value("7.5")
    expect(at.page.locator("#field-seed")).to_have_value(str(made["seed"]))

    before = at.works().first.get_attribute("src")
    at.page.locator("#run").click()
    expect(at.works().first).not_to_have_attribute("src", before)
    expect(at.works()).to_have_count(2)
    assert at.bodies()[-1] == sent | {"negative_prompt": "fog", "seed": made["seed"]}
    pictures = [httpx.get(url, trust_env=False).content for url in (before, at.works().first.get_attribute("src"))]
    assert pictures[0] == pictures[1]

    item.hover()
    item.locator(".delete").click()
    item.get_by_role("button", name="Delete for good?").click()
    expect(item).to_have_count(0)
    assert api.get(f"/api/v3/predictions/{made['id']}").status_code == 404


def test_the_gallery_has_pages(fake, visit):
    """Older works are on the next page."""
    at = visit(fake)
    api = fake.api(at.key)
    tiny = {"prompt": "one of many", "size": "512*512", "num_inference_steps": 1}
    jobs = [api.post("/api/v3/wavespeed-ai/sdxl", json=tiny).json()["data"] for _ in range(19)]
    poll(api, jobs[-1]["id"], ended)
    at.page.get_by_role("button", name="Load the gallery again").click()
    expect(at.page.locator(".work-item")).to_have_count(18)
    at.page.get_by_role("button", name="Older").click()
    expect(at.page.locator("#page")).to_have_text("page 2")
    expect(at.page.locator(f".work-item[data-id='{jobs[0]['id']}']")).to_have_count(1)
    at.page.get_by_role("button", name="Newer").click()
    expect(at.page.locator(".work-item").first).to_have_attribute("data-id", jobs[-1]["id"])


def test_the_snippets_are_the_request(fake, visit):
    """curl and Python, as copied, run and make the prediction that a click makes; JavaScript has the same body."""
    at = visit(fake, permissions=["clipboard-read", "clipboard-write"])
    at.page.locator("#tab-curl").click()
    prompt = 'a fox\'s "den", $HOME \\ `x` — ünïcode\nsecond line'
    at.paint(prompt, steps=2)
    expect(at.works()).to_have_count(1)
    [body] = at.bodies()
    assert body["prompt"] == prompt

    copied = {}
    for language in ("curl", "python", "javascript"):
        at.page.locator(f"#tab-{language}").click()
        at.page.get_by_role("button", name="Copy", exact=True).click()
        expect(at.page.locator("#copy")).to_have_text("Copied")
        copied[language] = at.page.evaluate("navigator.clipboard.readText()")
        assert copied[language] == at.page.locator("#snippet-text").text_content()
        expect(at.page.locator("#copy")).to_have_text("Copy")

    environment = {**os.environ, "WAVESPEED_API_KEY": at.key}
    made = subprocess.run(["sh", "-c", copied["curl"]], env=environment, capture_output=True, text=True, check=True)
    assert sent_for(fake, at.key, json.loads(made.stdout)["data"]["id"]) == body
    ran: list[tuple[str, Any]] = []
    stand_in = SimpleNamespace(Client=lambda **options: recording(wavespeed.Client(**options), ran))
    with_key = {"os": SimpleNamespace(environ=environment), "wavespeed": stand_in}
    exec(re.sub(r"^import .*$", "", copied["python"], flags=re.MULTILINE), with_key)
    assert ran == [("wavespeed-ai/sdxl-lora", body)]
    assert json.loads(re.search(r"client\.run\(\"[^\"]+\", (\{.*?^\})\)", copied["javascript"], re.S | re.M)[1]) == body


def sent_for(served: Served, key: str, job_id: str) -> dict[str, Any]:
    """What the service took for a prediction's request, as its list tells it."""
    listed = served.api(key).post("/api/v3/predictions", json={"page": 1, "page_size": 100, "include_inputs": True})
    [inputs] = [item["inputs"] for item in listed.json()["data"]["items"] if item["id"] == job_id]
    return dict(inputs)


def recording(client: wavespeed.Client, ran: list[tuple[str, Any]]) -> Any:
    """The official client, whose runs are written down."""

    def run(model: str, body: dict[str, Any]) -> Any:
        ran.append((model, body))
        return client.run(model, body, poll_interval=0.05)

    return SimpleNamespace(run=run)


def test_the_form_is_made_from_the_schema(fake, visit):
    """Ranges and defaults are those of the model list, for each model; one that takes no LoRAs offers none."""
    at = visit(fake)
    listed = fake.api(at.key).get("/api/v3/models").json()["data"]
    for model in listed:
        at.page.locator("#model").select_option(model["model_id"])
        properties = model["api_schema"]["api_schemas"][0]["request_schema"]["properties"]
        for name in ("num_inference_steps", "guidance_scale", "seed"):
            box = at.page.locator(f"#field-{name}")
            assert float(box.get_attribute("min")) == properties[name]["minimum"]
            assert float(box.get_attribute("max")) == properties[name]["maximum"]
            assert float(box.input_value()) == properties[name]["default"]
        options = at.page.locator("#field-scheduler option").evaluate_all("all => all.map((each) => each.value)")
        assert options == properties.get("scheduler", {}).get("enum", [])
        takes_loras = properties.get("loras", {}).get("maxItems", 0) > 0
        expect(at.page.locator("#loras-section")).to_be_visible(visible=takes_loras)
        expect(at.page.locator("#refine-section")).to_be_hidden()


def test_refiner_options_are_offered_where_there_is_a_refiner(fake, visit):
    """The page asks the server; an option's own values come with it, and a refusal stands at the option."""
    at = visit(fake, refusals=("400",))
    at.page.route("**/static/server.json", lambda route: route.fulfill(json={"refiner": True, "prompts": []}))
    at.page.reload()
    at.open_group("Refiner")
    expect(at.page.get_by_label("Hand-over")).to_be_hidden()
    at.page.locator("#field-refine").select_option("expert_ensemble_refiner")
    at.set("high_noise_frac", "0.7")
    at.paint("a boat")
    expect(at.page.locator("#error-refine")).to_contain_text("no refiner")
    assert at.bodies()[-1]["refine"] == "expert_ensemble_refiner" and at.bodies()[-1]["high_noise_frac"] == 0.7


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_needs_no_sideways_scrolling(fake, visit, width):
    """With everything open, an error, a picture, and all of the page's parts: the page is as wide as the phone."""
    at = visit(fake, viewport={"width": width, "height": 720}, has_touch=True, is_mobile=True, refusals=("400",))
    at.page.locator("details:not([open]) > summary").evaluate_all("all => all.forEach((each) => each.click())")
    at.page.get_by_role("button", name="Add a LoRA").click()
    at.page.locator("input[type=file]").set_input_files(png_file())
    expect(at.page.locator(".start-picture img")).to_be_visible()
    at.page.locator("#run").click()
    expect(at.page.locator(".error:visible, #alert:visible").first).to_be_visible()
    wide = "document.documentElement.scrollWidth"
    assert at.page.evaluate(wide) == width
    at.page.get_by_label("LoRA 1", exact=True).fill("x")
    at.page.get_by_role("button", name="Remove LoRA 1").click()
    at.paint("a boat")
    expect(at.works()).to_have_count(1)
    assert at.page.evaluate(wide) == width
    at.page.get_by_role("button", name="Paint a mask").click()
    expect(at.page.locator("#mask-done")).to_be_in_viewport(ratio=1)
    assert at.page.evaluate(wide) == width


def test_dark_and_light(fake, visit):
    """The system's preference counts until a theme is chosen, and the choice stays."""
    ground = "getComputedStyle(document.body).backgroundColor"
    at = visit(fake, color_scheme="dark")
    dark = at.page.evaluate(ground)
    at.page.emulate_media(color_scheme="light")
    light = at.page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)[:3]))
    for _ in range(2):
        at.page.locator("#theme").click()
    assert at.page.evaluate(ground) == dark
    at.page.reload()
    assert at.page.evaluate(ground) == dark


def test_the_keyboard_is_enough(fake, visit):
    """From the top of the page: key, prompt, Ctrl+Enter, and the focus is always seen. No mouse is used."""
    at = visit(fake, key=False)
    press, focused = at.page.keyboard.press, "document.activeElement.id"
    for _ in range(12):
        press("Tab")
        if at.page.evaluate(focused) == "key":
            break
    assert at.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    at.page.keyboard.insert_text(at.key)
    for _ in range(6):
        press("Tab")
        if at.page.evaluate(focused) == "field-prompt":
            break
    at.page.keyboard.type("a boat")
    press("Control+Enter")
    expect(at.works()).to_have_count(1)
    assert at.bodies()[-1]["prompt"] == "a boat"
    unnamed = "button, input, select, textarea, a"
    for control in at.page.locator(unnamed).all():
        if control.is_visible():
            assert accessible_name(control), control.evaluate("each => each.outerHTML")[:200]


def test_a_broken_stream_is_taken_up_where_it_broke(fake, visit):
    """The stream ends in the middle: the page comes back with the last id it saw, and the picture arrives."""
    at = visit(fake)
    asked: list[str | None] = []

    def cut(route: Route) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) > 1:
            return route.continue_()
        text = 'retry: 50\n\nid: 41-x\nevent: progress\ndata: {"step": 1, "total": 9}\n\n: half of\nevent: prog'
        return route.fulfill(body=text, content_type="text/event-stream")

    at.page.route("**/events", cut)
    at.paint("a boat", steps=10)
    expect(at.works()).to_have_count(1)
    assert asked[:2] == [None, "41-x"]


def test_a_flagged_picture_is_marked(fake, visit):
    """What the safety checker said of a picture stands below it; the checker can be switched off, hidden fields not."""
    at = visit(fake)
    at.open_group("Output")
    expect(at.page.locator("#field-enable_safety_checker")).to_be_checked()
    expect(at.page.locator("[data-field=disable_safety_checker]")).to_have_count(0)

    def flagged(route: Route) -> None:
        job_id = route.request.url.split("/")[-2]
        status = json.dumps(poll(fake.api(at.key), job_id, ended) | {"has_nsfw_contents": [True]})
        route.fulfill(body=f"event: status\ndata: {status}\n\n", content_type="text/event-stream")

    at.page.route("**/events", flagged)
    at.page.locator("#field-enable_safety_checker").uncheck()
    at.paint("a boat")
    expect(at.page.locator(".flagged")).to_have_text("flagged")
    assert at.bodies()[-1]["enable_safety_checker"] is False


def test_without_a_stream_the_page_polls(fake, visit):
    """Where something between cannot carry streams, results come by polling."""
    at = visit(fake, refusals=("404",))
    at.page.route("**/events", lambda route: route.fulfill(status=404, json={"code": 404, "message": "no"}))
    at.paint("a boat", steps=30)
    expect(at.page.locator("#progress-step")).to_have_text(re.compile(r"Step \d+"))
    expect(at.works()).to_have_count(1)


def test_a_page_that_comes_back_finds_its_form_and_its_running_job(fake, visit):
    """After a reload the settings are there, and a click in the gallery joins the work that goes on."""
    at = visit(fake)
    at.paint("a long voyage", steps=50)
    expect(at.page.locator("#progress-step")).to_have_text(re.compile("Step"))
    at.page.reload()
    at.page.locator("html[data-ready]").wait_for()
    expect(at.page.get_by_label("Prompt", exact=True)).to_have_value("a long voyage")
    at.page.locator(".open-work").first.click()
    deadline = time.monotonic() + PATIENCE / 1000
    while not at.works().count() and time.monotonic() < deadline:
        with contextlib.suppress(Error):
            at.works().first.wait_for(timeout=500)
    expect(at.works()).to_have_count(1)


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="set SCREENSHOTS=docs/images to draw those of the docs")
def test_screenshots(builtin, visit):
    """The pictures of docs/playground.md, with work of the shipped model in them."""
    folder = Path(os.environ["SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    at = visit(builtin, viewport={"width": 1280, "height": 800}, color_scheme="light")

    def keep(visit: Visit, name: str) -> None:
        visit.page.wait_for_timeout(1200)
        data, file = visit.page.screenshot(), folder / f"playground-{name}.jpg"
        Image.open(io.BytesIO(data)).convert("RGB").save(file, quality=88, subsampling=0, optimize=True)
        assert file.stat().st_size < 250_000

    api = builtin.api(at.key)
    body = {"size": "512*512", "num_inference_steps": 24}
    for prompt in ("a car on a white background", "a rocket on a purple background", "a cactus, yellow background"):
        job = api.post("/api/v3/wavespeed-ai/sdxl-lora", json=body | {"prompt": prompt, "seed": 7}).json()["data"]
        poll(api, job["id"], ended, 300)
    at.open_group("LoRAs")
    at.page.get_by_role("button", name="Add a LoRA").click()
    at.page.get_by_label("LoRA 1", exact=True).fill("pixel-art")
    at.page.get_by_label("Scale of LoRA 1").fill("0.8")
    at.set("seed", "7")
    at.paint("a mushroom on a pink background", steps=16)
    bar = at.page.get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"^[678]\d"), timeout=240_000)
    at.page.locator(".fields").evaluate("each => each.scrollTo(0, 0)")
    keep(at, "running")
    expect(at.works()).to_have_count(1, timeout=240_000)
    at.page.get_by_role("button", name="Use as start picture").click()
    at.page.get_by_role("button", name="Paint a mask").click()
    box = at.page.locator("#mask-canvas").bounding_box()
    path = [(0.28, 0.45), (0.36, 0.32), (0.5, 0.26), (0.64, 0.3), (0.74, 0.44), (0.6, 0.46), (0.4, 0.46), (0.5, 0.38)]
    spots = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in path]
    at.page.mouse.move(*spots[0])
    at.page.mouse.down()
    for spot in spots:
        at.page.mouse.move(*spot, steps=8)
    at.page.mouse.up()
    keep(at, "mask")

    dark = visit(builtin, viewport={"width": 1280, "height": 1500}, color_scheme="dark")
    dark.page.locator(".open-work").first.click()
    dark.works().wait_for()
    keep(dark, "dark")
    phone = visit(
        builtin, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    phone.page.locator(".open-work").nth(1).click()
    phone.works().wait_for()
    keep(phone, "phone")
