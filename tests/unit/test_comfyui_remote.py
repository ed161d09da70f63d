"""*SDXL LoRA (Impasto server)* and *LoRA inspect*: what goes to the server, what comes back, and what is said.

The second half runs inside ComfyUI, with its own types, against a real server.
"""

import base64
import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from impasto.client import Client
from impasto.comfyui.checks import fields_problem
from impasto.comfyui.request import read_request
from impasto.comfyui.sending import Sender, body_of, remote_report
from impasto.errors import BadRequest, ConfigError, InvalidInput, PredictionFailed, Unauthorized
from impasto.models.catalog import BUILTIN_FOLDER
from impasto.types import LoraRef
from impasto.worker.backend import FakeBackend
from tests.comfyui.inside import SETTING, comfyui_folder, enter_comfyui
from tests.contract.conftest import MODEL, serving

inside_comfyui = pytest.mark.skipif(
    comfyui_folder() is None, reason=f"set {SETTING} to a folder of ComfyUI and run with its Python"
)
LORA = BUILTIN_FOLDER / "loras" / "pixel-art.safetensors"
SIDE = 512
FIELDS = {
    "prompt": "a red fox", "negative_prompt": "", "width": SIDE, "height": SIDE + 8, "num_inference_steps": 6,
    "guidance_scale": 5.0, "num_images": 2, "seed": 7, "scheduler": "ddim", "strength": 0.6, "refine": "no_refiner",
    "enable_safety_checker": True,
}  # fmt: skip


@pytest.fixture
def stack(tmp_path):
    """A server without a worker."""
    with serving(tmp_path / "server") as running:
        yield running


def picture_in(uri: str) -> Image.Image:
    """Read a data URI."""
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_fields_become_the_apis_and_are_taken(stack):
    """Every field is where the API has it, and the real server takes the body as it is."""
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    values = {**FIELDS, "image": torch.rand(1, 16, 16, 3), "mask": mask}
    body = body_of(read_request(values, [LoraRef("pixel-art", 0.5)]), check=False)
    assert picture_in(body.pop("image")).size == (16, 16)
    assert picture_in(body.pop("mask_image")).getextrema() == (0, 255)
    assert body == {
        "prompt": "a red fox", "size": "512*520", "num_inference_steps": 6, "guidance_scale": 5.0, "num_images": 2,
        "seed": 7, "scheduler": "ddim", "strength": 0.6, "refine": "no_refiner", "enable_safety_checker": False,
        "acceleration": "exact", "output_format": "png", "loras": [{"path": "pixel-art", "scale": 0.5}],
    }  # fmt: skip
    with Client(stack.url, stack.key) as client:
        client.submit(MODEL, body_of(read_request(values, ()), check=True))
    [job] = stack.claim()
    asked = job.input["request"]
    assert (asked["height"], asked["scheduler"], asked["num_images"], asked["seed"]) == (520, "ddim", 2, 7)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("width", 516, "multiple of 8"), ("height", 2048, "between 512 and 1536"),
        ("scheduler", "magic", "one of euler"), ("refine", "yes", "one of no_refiner"),
    ],
)  # fmt: skip
def test_what_comfyui_does_not_check_is_checked(field, value, words):
    """A choice that is none and a side off the grid are named; what comes from another node is not there yet."""
    problem = fields_problem(**{field: value})
    assert problem and problem.startswith(field) and words in problem
    assert fields_problem() is None
    assert fields_problem(512, 1536, "K_EULER", "no_refiner") is None


def test_the_acceleration_is_sent():
    """As it was chosen; workflows of before it was there mean exact."""
    assert body_of(read_request({**FIELDS, "acceleration": "fast"}, ()), check=True)["acceleration"] == "fast"
    assert body_of(read_request(FIELDS, ()), check=True)["acceleration"] == "exact"


def test_an_empty_negative_prompt_is_not_sent():
    """To SDXL none and an empty one are two things, and the API's absent is none."""
    assert "negative_prompt" not in body_of(read_request(FIELDS, ()), check=True)
    assert body_of(read_request({**FIELDS, "negative_prompt": "cat"}, ()), check=True)["negative_prompt"] == "cat"


def test_local_loras_are_sent_once(stack, tmp_path):
    """A file of this machine becomes an address there, and is sent again only when it was changed."""
    file = tmp_path / "mine.safetensors"
    file.write_bytes(LORA.read_bytes())
    with Client(stack.url, stack.key) as client:
        sender = Sender(client, stack.url, lambda name: file if name == "mine.safetensors" else None)
        first = sender.path_of("mine.safetensors")
        assert client.has_upload(first)
        assert Sender(client, stack.url, lambda _: file).path_of("mine.safetensors") == first
        assert sender.path_of("owner/name") == "owner/name"
        os.utime(file, ns=(1, 1))
        assert sender.path_of("mine.safetensors") != first


def test_reports_have_the_stacks_names():
    """An uploaded file's address is a secret and is not shown; what was left out and what one may not expect is."""
    report = {
        "path": "http://host/uploads/secret", "scale": 0.5, "applied": {"unet": 10}, "kinds": {"LoRA": 10},
        "ranks": [4, 16], "unmatched": {"count": 12, "first": ["x.y"]}, "mismatched": {"count": 0, "first": []},
        "ignored": {"count": 0, "first": []}, "base_model": "SDXL", "trigger_words": ["pixel"], "sha256": "ab",
        "warnings": ["12 of its 22 modules do not fit."],
    }  # fmt: skip
    text = remote_report([report], [("mine.safetensors", 0.5, 0.2)])
    assert "secret" not in text and text.startswith("mine.safetensors at 0.5")
    for words in ("rank: 4 to 16", "unmatched: 12 (x.y, …)", "warning: 12 of its 22", "not 0.2", "applied: unet 10"):
        assert words in text
    assert "mismatched" not in text and "not 0.5" not in remote_report([report], [("mine", 0.5, 0.5)])
    assert remote_report([], []) == "No LoRA."


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """ComfyUI's own modules, with a loras folder and a user folder of ours; its progress bars are heard."""
    enter_comfyui()
    sys.modules.pop("utils", None)  # of whoever: ComfyUI means its own
    sys.path.insert(0, str(comfyui_folder()))
    import comfy.utils
    import folder_paths
    import utils.install_util  # noqa: F401  (before ComfyUI puts a folder on the path that has a utils of its own)
    from server import PromptServer

    sys.path.pop(0)
    base = tmp_path_factory.mktemp("comfyui")
    (base / "loras").mkdir()
    folder_paths.set_user_directory(str(base))
    folder_paths.folder_names_and_paths["loras"] = ([str(base / "loras")], {".safetensors"})

    class Heard:
        """What a page would be told."""

        def __init__(self) -> None:
            self.bars: list[tuple] = []
            self.texts: list[str] = []
            self.client_id = "page"

        def send_progress_text(self, text, node_id, sid=None):
            """Keep it."""
            assert (node_id, sid) == ("42", "page")
            self.texts.append(text)

        def show(self, value, total, preview, node_id=None):
            """Keep it."""
            self.bars.append((value, total, preview))

    heard = Heard()
    PromptServer.instance = heard
    comfy.utils.set_progress_bar_global_hook(heard.show)
    yield heard, base
    comfy.utils.set_progress_bar_global_hook(None)
    del PromptServer.instance


@pytest.fixture
def node(comfy, stack, monkeypatch):
    """The node as ComfyUI prepares it for a run, with its server in the environment."""
    from impasto.comfyui.remote import ServerSdxlLora

    comfy[0].bars.clear()
    monkeypatch.setenv("IMPASTO_SERVER_URL", stack.url)
    monkeypatch.setenv("IMPASTO_API_KEY", stack.key)
    return ServerSdxlLora.PREPARE_CLASS_CLONE({"UNIQUE_ID": "42"})


@inside_comfyui
def test_pictures_flags_seed_and_report(node, comfy, stack):
    """A run gives an IMAGE batch, a flag each, the seed and the report; the bar moves and previews are shown."""
    with stack.worker(FakeBackend(step_seconds=0.3), previews=True):
        images, flags, seed, report = node.execute(**FIELDS).args
    assert (images.shape, images.dtype, str(images.device)) == ((2, 520, 512, 3), torch.float32, "cpu")
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert (flags, seed, report) == ([False, False], 7, "No LoRA.")
    heard = comfy[0]
    values = [value for value, _, _ in heard.bars]
    assert values == sorted(values) and max(values) > 0
    assert any(preview and preview[0] == "JPEG" and isinstance(preview[1], Image.Image) for *_, preview in heard.bars)
    assert heard.texts[-1] == "completed"


@inside_comfyui
def test_the_stop_button_cancels_the_job(node, stack):
    """An interrupt ends the node and the server's job, even while nothing happens there."""
    import comfy.model_management as management

    threading.Timer(0.5, management.interrupt_current_processing).start()
    with pytest.raises(management.InterruptProcessingException):
        node.execute(**FIELDS)
    client = stack.client()
    [job] = client.post("/api/v3/predictions", json={}).json()["data"]["items"]
    assert job["error"].startswith("cancelled")


@inside_comfyui
def test_errors_are_in_the_servers_words(node, stack, monkeypatch):
    """A job that fails, a key that is wrong and a setting that is missing each say what to do."""
    with stack.worker(FakeBackend(step_seconds=0.001)), pytest.raises(PredictionFailed, match=r"nobody.*was not found"):
        node.execute(lora_stack=[("nobody", 1.0, 1.0)], **FIELDS)
    with pytest.raises(BadRequest, match="scale"):
        node.execute(lora_stack=[("pixel-art", -1.0, -1.0)], **FIELDS)
    monkeypatch.setenv("IMPASTO_API_KEY", "wrong")
    with pytest.raises(Unauthorized, match="IMPASTO_API_KEY"):
        node.execute(**FIELDS)
    monkeypatch.delenv("IMPASTO_API_KEY")
    with pytest.raises(ConfigError, match="Settings"):
        node.execute(**FIELDS)


@inside_comfyui
def test_comfyuis_settings_are_enough(node, comfy, stack, monkeypatch):
    """Address and key from the Settings dialog, nothing from the environment."""
    monkeypatch.delenv("IMPASTO_API_KEY")
    monkeypatch.delenv("IMPASTO_SERVER_URL")
    file = comfy[1] / "default" / "comfy.settings.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"Impasto.ServerURL": stack.url, "Impasto.APIKey": stack.key}))
    with stack.worker(FakeBackend(step_seconds=0.001)):
        assert node.execute(**FIELDS).args[2] == 7
    file.unlink()


@inside_comfyui
def test_no_widget_is_a_key_or_an_address(comfy):
    """What is saved with a workflow holds neither."""
    from impasto.comfyui import node_classes

    for one in node_classes():
        told = one.GET_NODE_INFO_V1()
        names = {name.lower() for fields in told["input"].values() for name in fields}
        assert names and not any(word in name for name in names for word in ("key", "token", "secret", "server", "url"))


@inside_comfyui
def test_inspection_says_what_a_file_is(comfy):
    """The report of ``impasto lora inspect``, whether it applies, and the words for the prompt."""
    from impasto.comfyui.inspect import LoraInspect

    (comfy[1] / "loras" / "mine.safetensors").write_bytes(LORA.read_bytes())
    (comfy[1] / "loras" / "broken.safetensors").write_bytes(b"no")
    seen = LoraInspect.execute("mine.safetensors", "builtin", lora_stack=[("line-art", 1.0, 1.0)])
    text, applies, words = seen.args
    assert applies and "pixel art" in words
    assert text.count("applies to builtin") == 2 and "mine.safetensors" in text and "unet" in text
    assert seen.ui.as_dict()["text"] == (text,)
    with pytest.raises(InvalidInput, match="choose one"):
        LoraInspect.execute("None", "builtin")
    with pytest.raises(InvalidInput, match="loras folder"):
        LoraInspect.execute("None", "builtin", lora_stack=[("nobody", 1.0, 1.0)])
    before = LoraInspect.fingerprint_inputs("mine.safetensors", "builtin")
    os.utime(comfy[1] / "loras" / "mine.safetensors", ns=(1, 1))
    assert LoraInspect.fingerprint_inputs("mine.safetensors", "builtin") != before


@inside_comfyui
def test_the_extension_lists_every_node(comfy):
    """ComfyUI's entry point gives each node of the list whose module is there, once."""
    import asyncio

    from impasto.comfyui import NODES, comfy_entrypoint

    extension = asyncio.run(comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    here = Path(__file__).parents[2] / "src" / "impasto" / "comfyui"
    assert [one.__name__ for one in listed] == [
        name for module, names in NODES.items() if (here / f"{module}.py").is_file() for name in names
    ]
    ids = [one.GET_SCHEMA().node_id for one in listed]
    assert len(set(ids)) == len(ids) and all(name.startswith("Impasto") for name in ids)
