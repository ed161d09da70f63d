"""One test for each advisory that services like this one have had (docs/security-checks.md lists them): what was done
there is done here, and comes to nothing. Each has a control that shows the harm where nothing guards."""

from __future__ import annotations

import ast
import io
import os
import pickle
import re
import socket
import threading
import zipfile
from pathlib import Path

import httpx
import pytest
from PIL import Image, PngImagePlugin

import impasto
from impasto.config import Settings
from impasto.errors import ImpastoError, InvalidInput, LoraError
from impasto.fetch.addresses import Policy
from impasto.fetch.allowed import Hosts
from impasto.fetch.client import Client
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from impasto.images import read_picture
from impasto.lora.gate import check_header
from impasto.models.catalog import find_model
from impasto.worker.loras import LoraLibrary
from tests.contract.conftest import MODEL, refusal, submit
from tests.sites import Page, Web, running

SOURCE = Path(impasto.__file__).parent
SENTINEL = b"the sentinel of this test"


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [bytes, zipped], ids=["pickle", "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.pt"])
def test_no_file_is_run(tmp_path, stack, wrap, name):
    """CVE-2024-12029 (InvokeAI): a pickle under any name is refused as LoRA, as model and as upload, and not run."""
    done = tmp_path / "it ran"
    file = tmp_path / name
    file.write_bytes(wrap(pickle.dumps(Runs(done))))
    with pytest.raises(LoraError):
        check_header(file, "loras.0.path")
    with pytest.raises(ImpastoError):
        find_model(str(file))
    files = {"file": (name, file.read_bytes())}
    assert stack.client().post("/api/v3/media/upload/binary", files=files).status_code == 400
    assert not done.exists()
    pickle.loads(pickle.dumps(Runs(done)))
    assert done.exists(), "the control: such a file does run"


def raw_get(stack, target: str, method: str = "GET") -> bytes:
    """Send a path as it is; clients would tidy it up."""
    with socket.create_connection(("127.0.0.1", int(stack.url.rpartition(":")[2])), timeout=10) as connection:
        head = (
            f"{method} {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.key}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode("latin-1"))
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


WAYS_OUT = [
    "/outputs/../{}", "/outputs/..%2f{}", "/outputs/%2e%2e/{}", "/outputs/....//{}", "/outputs//{}",
    "/outputs/x/../../{}",
    "/uploads/..%2f{}", "/uploads/%2e%2e%5c{}", "/outputs/..\\{}", "/outputs/{}%00.png", "/uploads/{}", "/{}",
    "/playground/../{}", "/static/../{}", "/outputs/" + "0" * 32 + "/../../{}",
]  # fmt: skip


def test_no_name_of_a_picture_reads_or_deletes_another_file(stack):
    """CVE-2024-11042, CVE-2025-6237 (InvokeAI), CVE-2026-56671, -56672 (ComfyUI): ids are server-made; paths lead
    nowhere. The control: a picture's own name is served."""
    secret = stack.settings.data_dir / "sentinel.txt"
    secret.write_bytes(SENTINEL)
    beside = stack.settings.data_dir / "outputs" / "sentinel.png"
    beside.parent.mkdir(exist_ok=True)
    beside.write_bytes(SENTINEL)
    for way in WAYS_OUT:
        for name in ("sentinel.txt", "outputs/sentinel.png", "sentinel.png", "impasto.db", str(secret)):
            for method in ("GET", "DELETE", "HEAD"):
                answer = raw_get(stack, way.format(name), method)
                assert SENTINEL not in answer and b"SQLite format" not in answer
                assert answer.split(b" ", 2)[1] in (b"400", b"404", b"405"), (way, name, answer[:80])
    client = stack.client()
    for spelled in ("../../sentinel.txt", str(secret), "..%2fsentinel.txt"):
        client.delete(f"/api/v3/predictions/{spelled}")
        client.post("/api/v3/predictions/delete", json={"ids": [spelled]})
    assert secret.read_bytes() == beside.read_bytes() == SENTINEL
    data = submit(client)
    stack.work_off()
    [url] = client.get(data["urls"]["get"]).json()["data"]["outputs"]
    assert b"200 OK" in raw_get(stack, url.removeprefix(stack.url))


def test_tokens_lie_in_no_file_that_is_served_or_written(serve, tmp_path):
    """InvokeAI 6.13.7: the operator's tokens are in the environment alone; no route and no file of ours has them."""
    with serve(hf_token="hf_sentinel_1", civitai_token="civ_sentinel_2") as stack:
        client = stack.client()
        submit(client)
        stack.work_off()
        shown = [client.get(path).text for path in ("/", "/openapi.json", "/metrics", "/api/v3/models", "/healthz")]
        shown += [raw_get(stack, f"/{name}").decode("latin-1") for name in ("impasto.toml", ".env", "settings")]
        shown.append(repr(stack.settings))
        written = [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
        assert written
        assert not [text for text in shown + written if "sentinel_" in text]
        assert "sentinel_1" in "".join(stack.settings.to_environment().values()), "the control: they are set"


def test_a_servers_file_name_is_not_taken(tmp_path):
    """InvokeAI 6.13.8: whatever Content-Disposition says, what is fetched lies in the cache under its hash."""
    from tests.unit.test_lora_gate import pair

    with running(Web()) as web:
        evil = {"Content-Disposition": 'attachment; filename="../../../evil.py"'}
        web.pages["/x.safetensors"] = Page(pair(), headers=evil)
        settings = Settings(
            data_dir=tmp_path / "data", model="fake", fetch_allow=["127.0.0.1"], fetch_http=True,
            fetch_ports=[web.server_port],
        )  # fmt: skip
        LoraLibrary.of(settings).find(f"{web.url}/x.safetensors", "loras.0.path", "key")
        assert web.reached
    files = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if re.fullmatch(r"data/cache/blobs/[0-9a-f]{64}\.safetensors", file)]
    assert not [file for file in files if "evil" in file or not file.startswith("data/cache/")]


def polyglot() -> bytes:
    """A true PNG that is also a page with a script."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "<html><script>alert(document.domain)</script>")
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue() + b"<script>alert(1)</script>"


def test_nothing_that_is_served_can_run_in_a_browser(stack):
    """CVE-2024-10099, CVE-2026-56670, -56673 (ComfyUI): pages and SVG are no uploads; a picture that is a page, too,
    is served as the picture it is, sandboxed; and what a job starts from is encoded anew."""
    client = stack.client()
    for data in (b"<html><script>1</script>", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"):
        files = {"file": ("x.png", data, "image/png")}
        assert client.post("/api/v3/media/upload/binary", files=files).status_code == 400
    assert b"<script>" in polyglot(), "the control"
    for name, claimed in (("x.html", "text/html"), ("x.svg", "image/svg+xml"), ("x.png", "image/png")):
        answer = client.post("/api/v3/media/upload/binary", files={"file": (name, polyglot(), claimed)})
        url = answer.json()["data"]["download_url"]
        for spelled in (url, re.sub(r"\.\w+$", ".html", url)):
            served = httpx.get(spelled)
            assert served.headers["content-type"] == "image/png"
            assert served.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in served.headers["content-security-policy"]
    submit(client, image=url)
    kept = [f.read_bytes() for f in (stack.settings.data_dir / "outputs").rglob("*.png") if b"IHDR" in f.read_bytes()]
    [started] = [job.input["pictures"]["image"] for job in stack.claim() if job.input["pictures"]]
    assert kept
    assert b"script" not in stack.outputs.get_input(started)


def test_a_link_does_not_lead_out_of_the_folder(tmp_path):
    """ComfyUI#12285: the path is resolved before it is compared. The control: comparing first lets the link through."""
    loras, outside = tmp_path / "loras", tmp_path / "outside"
    (tmp_path / "loras-evil").mkdir()
    loras.mkdir()
    outside.mkdir()
    for folder in (outside, tmp_path / "loras-evil"):
        (folder / "x.safetensors").write_bytes(SENTINEL)
    (loras / "link").symlink_to(outside)
    (loras / "y.safetensors").symlink_to(outside / "x.safetensors")
    naive = os.path.abspath(loras / "link" / "x.safetensors")
    assert os.path.commonpath([naive, loras]) == str(loras)
    assert Path(naive).read_bytes() == SENTINEL
    library = LoraLibrary(loras)
    for name in ("link/x", "y", "../outside/x", "../loras-evil/x", str(outside / "x"), "link/x\0", "/etc/passwd"):
        with pytest.raises(LoraError):
            library.find(name, "loras.0.path", "key")


def modules() -> list[tuple[Path, ast.Module]]:
    return [(file, ast.parse(file.read_text())) for file in SOURCE.rglob("*.py")]


def test_nothing_is_installed_or_configured_over_http(stack):
    """CVE-2024-21574, CVE-2025-67303, CVE-2026-22777 (ComfyUI-Manager), CVE-2024-21575, -21576, CVE-2026-123790: there
    are no such routes, no plug-ins, and no program is started but our own worker and, where it is switched on, a
    compiler on a file of the package; by hand, the Python of a ComfyUI."""
    paths = {getattr(route, "path", "") for route in stack.app.routes} | set(stack.app.openapi()["paths"])
    words = re.compile(r"install|config|setting|plugin|extension|custom|node|exec|shell|restart|reboot|update|eval")
    assert "/openapi.json" in paths
    assert not [path for path in paths if words.search(path)]
    starting = {"subprocess", "pty", "pip", "ensurepip"}
    found = set()
    for file, module in modules():
        for node in ast.walk(module):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if {name.partition(".")[0] for name in names} & starting:
                found.add(file.relative_to(SOURCE).as_posix())
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), file
    assert found == {"worker/supervisor.py", "models/native.py", "comfyui/install.py"}


def test_no_text_of_a_user_becomes_a_path(serve, tmp_path):
    """CVE-2024-31462 (A1111): prompts, names and ids that look like paths leave files under names of our own alone."""
    with serve() as stack:
        client = stack.client()
        evil = "../../evil-sentinel"
        data = submit(client, prompt=evil, negative_prompt=evil, output_format="png")
        stack.work_off()
        client.post("/api/v3/media/upload/binary", files={"file": (f"{evil}.png", polyglot())})
        client.post(f"/api/v3/{MODEL}", json={"prompt": "x"}, headers={"Idempotency-Key": evil})
        client.post("/api/v3/media/uploads", json={"filename": f"{evil}.png", "size": 10})
        assert client.get(data["urls"]["get"]).json()["data"]["status"] == "completed"
    files = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()]
    ours = re.compile(r"data/(impasto\.db(-wal|-shm)?|(outputs|incoming)/[\w./-]+)")
    assert [file for file in files if "/outputs/" in file]
    assert [file for file in files if not ours.fullmatch(file) or "evil" in file] == []


def test_no_code_of_a_repository_is_run():
    """CVE-2026-44513 (diffusers): every ``from_pretrained`` of ours reads a folder here, and none trusts its code."""
    calls = 0
    for file, module in modules():
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("trust_remote_code") in (None, "False"), file
                if node.func.attr == "from_pretrained":
                    calls += 1
                    text = ast.unparse(node)
                    assert "local_files_only=True" in text or "**local" in text or "hub" not in text, (file, text)
    assert calls


def test_pictures_by_address_go_through_the_guard_alone(stack):
    """diffusers#13761: its ``load_image`` fetches what it is given (the control), and we never call it; a start picture
    at an address of this machine is refused undialled."""
    from diffusers.utils import load_image

    with running(Web()) as web:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        web.pages["/x.png"] = Page(buffer.getvalue())
        answer = stack.client().post(f"/api/v3/{MODEL}", json={"prompt": "x", "image": f"{web.url}/x.png"})
        refusal(answer, 400)
        assert web.reached == 0
        assert load_image(f"{web.url}/x.png").size == (8, 8)
        assert web.reached == 1
    for file, module in modules():
        names = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}
        assert not names & {"load_image", "load_video", "urlopen", "urlretrieve"}, file
        imported = {ast.unparse(node) for node in ast.walk(module) if isinstance(node, ast.Import | ast.ImportFrom)}
        assert not [
            line for line in imported if re.match(r"(from|import) (requests|urllib\.request|aiohttp)\b", line)
        ], file


def test_redirects_and_changing_names_lead_nowhere():
    """CVE-2026-34753 (vLLM), CVE-2026-45400, -45401, -54020 (Open WebUI): no check, a redirect, a name that changes.
    The control: an unguarded client ends at the sentinel each time."""
    with running(Web()) as inside, running(Web()) as outside:
        inside.pages["/x"] = Page(SENTINEL)
        outside.pages["/go"] = Page(status=302, headers={"Location": f"{inside.url}/x"})
        for url in (f"{inside.url}/x", f"{outside.url}/go"):
            assert httpx.get(url, follow_redirects=True, trust_env=False).content == SENTINEL
        reached, ports = inside.reached, [inside.server_port, outside.server_port]
        closed = Client(Policy.of([], allow_http=True, ports=ports))
        half = Client(Policy.of(["outside.example"], allow_http=True, ports=ports), resolver=lambda h, p: ["127.0.0.1"])
        turning = Client(
            Policy.of([], allow_http=True, ports=ports), resolver=lambda h, p: ["93.184.216.34", "127.0.0.1"]
        )
        urls = [
            (closed, f"{inside.url}/x"),
            (half, f"http://outside.example:{outside.server_port}/go"),
            (turning, f"http://turning.example:{inside.server_port}/x"),
        ]
        for client, url in urls:
            with pytest.raises(FetchFailed), client.open(url, Clock(5), max_bytes=1000) as answer:
                answer.read()
        assert inside.reached == reached


def test_a_list_of_hosts_is_no_pattern_to_be_fooled():
    """GHSA-j2hp-6m75-v4j4 (imgproxy), PYSEC-2023-298 (safeurl): 0.0.0.0 is this machine, and a listed name is that name
    and not what merely contains, begins or ends like it. The control: a search by regular expression is fooled."""
    policy = Policy.of([], only=Hosts.of(["models.example"], "fetch_hosts"))
    fooled = ["models.example.evil.example", "evil-models.example", "modelsxexample", "evil.example?models.example"]
    for host in fooled:
        assert re.search("models.example", host)
        with pytest.raises(FetchFailed, match="list of hosts"):
            policy.read_url(f"https://{host}/x")
    assert policy.read_url("https://MODELS.example./x").host
    with pytest.raises(FetchFailed), Client(Policy()).open("https://0.0.0.0/", Clock(5), max_bytes=10):
        pass


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "TGA", "PCX", "SGI", "DDS", "EPS", "PDF", "JPEG2000"])
def test_rare_decoders_are_never_tried(kind):
    """GHSA-8g5g-8vmr-9782, CVE-2026-112403, -112398, -40192, -55379, -55380, -54059 (Pillow): only five kinds are
    decoded, whatever else Pillow can. The control: Pillow alone opens the same bytes."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((128, 128)).save(buffer, kind)
    if kind not in ("PDF",):
        assert Image.open(io.BytesIO(buffer.getvalue())).size == (128, 128)
    with pytest.raises(InvalidInput):
        read_picture(buffer.getvalue(), "image")


@pytest.mark.parametrize(
    "start", [b"SIMPLE  =                    T", b"\xff\xfe\0\x10", b"\x01fcp", b"STARTFONT 2.1\n"]
)
def test_formats_whose_size_checks_were_passed_by_are_not_read(start):
    """FITS, GD, PCF and BDF by their first bytes."""
    with pytest.raises(InvalidInput):
        read_picture(start + bytes(4000), "image")


def test_many_at_once_hold_nobody_up(stack):
    """CVE-2024-47874, CVE-2025-54121 (Starlette): a form part without an end is refused at the limit, and others are
    answered while it comes."""
    head = (
        f"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.key}\r\n"
        "Transfer-Encoding: chunked\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    part = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    status: list[bytes] = []

    def flood() -> None:
        with socket.create_connection(("127.0.0.1", int(stack.url.rpartition(":")[2])), timeout=30) as connection:
            connection.sendall(head.encode() + f"{len(part):x}\r\n".encode() + part + b"\r\n")
            block = b"a" * 2**20
            try:
                for _ in range(64):
                    connection.sendall(f"{len(block):x}\r\n".encode() + block + b"\r\n")
            except OSError:
                pass
            status.append(connection.recv(100))

    threads = [threading.Thread(target=flood) for _ in range(3)]
    for thread in threads:
        thread.start()
    client = stack.client()
    while any(thread.is_alive() for thread in threads):
        assert client.get("/healthz").elapsed.total_seconds() < 5
    assert all(b" 413 " in line for line in status)
