"""*SDXL LoRA (local)*: fields become a request, pictures become tensors, and the engine lives with ComfyUI's memory.

The second half runs inside ComfyUI, with the built-in model and a small checkpoint.
"""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from impasto.comfyui.request import read_request
from impasto.comfyui.tensors import image_batch, mask_picture, one_picture
from impasto.engine.engine import Engine
from impasto.errors import InvalidInput, LoraError, ModelError
from impasto.models.catalog import BUILTIN_FOLDER
from impasto.types import LIMITS, GenerationRequest, ImageReady, LoraRef
from tests.comfyui.inside import SETTING, comfyui_folder, enter_comfyui

inside_comfyui = pytest.mark.skipif(
    comfyui_folder() is None, reason=f"set {SETTING} to a folder of ComfyUI and run with its Python"
)
SIDE, STEPS = 128, 2  # pixels; smaller than a node's field offers, for speed
FIELDS = {
    "prompt": "a red fox on a blue background", "negative_prompt": "", "width": SIDE, "height": SIDE,
    "num_inference_steps": STEPS, "guidance_scale": 5.0, "num_images": 1, "seed": 7, "scheduler": "euler",
    "strength": 0.6, "refine": "no_refiner", "enable_safety_checker": False,
}  # fmt: skip
PIXEL_ART = "pixel-art"


def test_the_fields_are_a_request():
    """Each field is where it belongs, and LoRAs keep both of their strengths."""
    loras = [LoraRef("/a", 0.5, 0.25)]
    request = read_request({**FIELDS, "negative_prompt": "cat", "scheduler": "ddim", "acceleration": "fast"}, loras)
    assert request == GenerationRequest(
        prompt="a red fox on a blue background", negative_prompt="cat", width=SIDE, height=SIDE,
        num_inference_steps=STEPS, seed=7, scheduler="ddim", strength=0.6, loras=tuple(loras),
        acceleration="fast",
    )  # fmt: skip


def test_an_empty_negative_prompt_is_none():
    """SDXL takes zeros where there is none, which is not an empty text."""
    assert read_request(FIELDS, ()).negative_prompt is None


def test_a_start_picture_and_its_mask():
    """ComfyUI's IMAGE and MASK are the request's pictures, number for number; a mask of nothing is none."""
    picture = torch.rand(1, 8, 6, 3)
    mask = torch.zeros(1, 8, 6)
    mask[0, 2:4, 1:] = 1
    request = read_request({**FIELDS, "image": picture, "mask": mask}, ())
    assert request.image is not None and request.mask_image is not None
    assert request.image.size == (6, 8)
    np.testing.assert_array_equal(np.array(request.image), (picture[0] * 255).round().numpy().astype(np.uint8))
    assert (request.mask_image.mode, np.array(request.mask_image).tolist()) == ("L", (mask[0] * 255).int().tolist())
    assert read_request({**FIELDS, "image": picture, "mask": torch.zeros(1, 64, 64)}, ()).mask_image is None


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("image", torch.rand(2, 8, 8, 3), "one of the batch"),
        ("image", torch.rand(1, 8, 8, 1), "channels"),
        ("mask", torch.ones(2, 8, 8), "one of the batch"),
        ("mask", torch.ones(1, 8, 8), "needs an image"),
        ("width", 500, "multiple of 8"),
        ("prompt", " ", "must not be empty"),
    ],
)
def test_a_wrong_value_is_named(field, value, problem):
    """What ComfyUI's own check of ranges lets through is an error that names the field."""
    with pytest.raises(InvalidInput, match=problem) as caught:
        read_request({**FIELDS, field: value}, ())
    assert field in str(caught.value)


def test_pictures_become_a_batch_and_come_back():
    """A batch is ``[B, H, W, 3]`` float32 from 0 to 1 on the CPU, and no number is lost on the way."""
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for _ in range(3)]
    batch = image_batch(pictures)
    assert (batch.shape, batch.dtype, batch.device.type) == ((3, 4, 6, 3), torch.float32, "cpu")
    for picture, tensor in zip(pictures, batch, strict=True):
        assert tensor.min() >= 0 and tensor.max() <= 1
        np.testing.assert_array_equal(np.array(one_picture("image", tensor)), np.array(picture))


def test_transparency_and_lone_pictures():
    """A picture without the first axis is taken, and a fourth channel is transparency."""
    assert one_picture("image", torch.rand(4, 6, 4)).mode == "RGBA"
    assert mask_picture("mask", torch.ones(4, 6)) is not None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """ComfyUI's folders: the built-in model's LoRAs, and a small checkpoint."""
    enter_comfyui()
    import folder_paths

    from tests.comfyui.models import save_small_checkpoint

    checkpoints = tmp_path_factory.mktemp("checkpoints")
    save_small_checkpoint(checkpoints / "small.safetensors")
    (checkpoints / "broken.safetensors").write_bytes(b"<html>")
    folder_paths.add_model_folder_path("checkpoints", str(checkpoints), is_default=True)
    loras = tmp_path_factory.mktemp("loras")
    (loras / "page.safetensors").write_text("<html>log in</html>")
    folder_paths.add_model_folder_path("loras", str(loras), is_default=True)
    return checkpoints


@pytest.fixture
def node(folders):
    """The node; its engine goes afterwards."""
    from impasto.comfyui import local

    yield local.LocalSdxlLora
    local.RESIDENT.drop()


def run(node, checkpoint: str = "builtin", stack=None, **fields):
    """What the node returns, run as ComfyUI does."""
    with torch.inference_mode():
        return node.execute(checkpoint, fields.pop("refiner", "None"), lora_stack=stack, **{**FIELDS, **fields}).args


@pytest.fixture(scope="module")
def engine():
    return Engine.load("builtin", device="cpu")


def pictures_of(engine: Engine, request: GenerationRequest) -> torch.Tensor:
    return image_batch([event.image for event in engine.generate(request) if isinstance(event, ImageReady)])


@inside_comfyui
def test_its_pictures_are_the_engines(node, engine):
    """Two pictures with a LoRA at other strengths for UNet and text: the engine's own, bit for bit, with seed, flags
    and a report under the name that ComfyUI lists."""
    images, nsfw, seed, report = run(node, stack=[(PIXEL_ART, 0.9, 0.4)], num_images=2)
    lora = LoraRef(str(BUILTIN_FOLDER / "loras" / f"{PIXEL_ART}.safetensors"), 0.9, 0.4)
    wanted = read_request({**FIELDS, "num_images": 2}, [lora])
    assert torch.equal(images, pictures_of(engine, wanted))
    assert (nsfw, seed) == ([False, False], 7)
    assert report.startswith(f"'{PIXEL_ART}' at 0.9: LoRA")


@inside_comfyui
def test_a_lora_is_found_as_people_write_it(folders):
    """By the name that ComfyUI lists, without its ending, and the built-in model's own by its word; a file of ComfyUI's
    folders goes before those."""
    import folder_paths

    from impasto.comfyui.folders import lora_file

    [own, *_] = folder_paths.get_folder_paths("loras")
    assert lora_file("page") == lora_file("page.safetensors")
    assert lora_file("line-art") == BUILTIN_FOLDER / "loras" / "line-art.safetensors"
    (Path(own) / "line-art.safetensors").write_bytes(b"")
    assert lora_file("line-art") == Path(own) / "line-art.safetensors"
    for name in ("nowhere", "../loras/line-art", "/etc/passwd"):
        with pytest.raises(LoraError, match="loras folders"):
            lora_file(name)


@inside_comfyui
def test_pictures_are_checked_where_that_is_asked_for(node, monkeypatch):
    """The checker sees each finished picture; a flagged one comes out black, and is told."""
    from impasto.comfyui import local
    from impasto.safety.checker import Verdict

    images, nsfw, *_ = run(node, enable_safety_checker=True)
    assert nsfw == [False]
    assert images.std() > 0.02

    class Strict:
        name = version = "strict"

        def check(self, images):
            return [Verdict(True, 1.0, self.name) for _ in images]

    monkeypatch.setattr(local, "_checker", Strict)
    images, nsfw, *_ = run(node, enable_safety_checker=True)
    assert (nsfw, images.abs().max().item()) == ([True], 0)


@inside_comfyui
def test_steps_and_previews_are_shown(node):
    """ComfyUI's progress bar hears of every step, and gets previews that are pictures."""
    import comfy.utils

    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: seen.append((value, preview)))
    try:
        run(node)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert [value for value, preview in seen if preview is None] == list(range(1, STEPS + 1))
    previews = [preview for _, preview in seen if preview is not None]
    assert previews
    assert all(kind == "JPEG" and picture.size == (SIDE // 8, SIDE // 8) for kind, picture, _ in previews)


@inside_comfyui
def test_the_stop_button_ends_it_before_the_next_step(node):
    """An interrupt in the middle leaves nothing running in the engine, which then draws as before."""
    import comfy.model_management
    import comfy.utils

    from impasto.comfyui import local

    values = []

    def stop(value, total, preview, node_id=None):
        values.append(value)
        comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(node, num_inference_steps=20)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert max(values) == 1
    engine = local.RESIDENT.engine
    assert engine is not None and not engine.busy
    images, *_ = run(node)
    assert images.shape == (1, SIDE, SIDE, 3)


@inside_comfyui
def test_comfyuis_own_checkpoint_and_errors(node, folders):
    """A single-file checkpoint of ComfyUI's folder is drawn with; what is wrong is named as ComfyUI lists it."""
    images, *_ = run(node, "small.safetensors", num_inference_steps=1)
    assert images.shape == (1, SIDE, SIDE, 3)
    assert isinstance(node.fingerprint_inputs(checkpoint="small.safetensors"), str)
    assert node.fingerprint_inputs(checkpoint="gone.safetensors") is None
    for name, problem in (("gone.safetensors", "loras folders"), ("page.safetensors", "HTML page")):
        with pytest.raises(LoraError, match=problem) as caught:
            run(node, "small.safetensors", [(name, 1.0, 1.0)])
        assert str(caught.value).startswith(f"LoRA '{name}'")
    with pytest.raises(ModelError, match="gone"):
        run(node, "gone.safetensors")
    assert "gone" in node.validate_inputs(checkpoint="builtin", refiner="gone.safetensors")
    assert "scheduler" in node.validate_inputs(checkpoint="small.safetensors", scheduler="magic")
    assert node.validate_inputs(checkpoint="small.safetensors", refiner="None", width=SIDE * 4) is True
    with pytest.raises(ModelError, match="broken"):
        run(node, "broken.safetensors")
    with pytest.raises(InvalidInput, match="refine"):
        run(node, refine="base_image_refiner")


class Loader:
    """Loads the small checkpoint, and counts."""

    def __init__(self, path: Path) -> None:
        self.path, self.loads = path, 0

    def __call__(self, wanted, device: str) -> Engine:
        self.loads += 1
        return Engine.load(str(self.path), device=device)


@inside_comfyui
def test_the_engine_stays_until_comfyui_wants_its_memory(folders):
    """It is loaded once, is one of ComfyUI's loaded models, and is gone from memory when ComfyUI unloads those."""
    import comfy.model_management

    from impasto.comfyui.resident import Resident, Wanted

    load = Loader(folders / "small.safetensors")
    resident, wanted = Resident(load), Wanted.now(load.path, None)
    first = weakref.ref(resident.get(wanted))
    assert resident.get(wanted) is first()
    assert load.loads == 1
    names = [type(place.model).__name__ for place in comfy.model_management.loaded_models()]
    assert names.count("ImpastoEngine") == 1
    [place] = [p for p in comfy.model_management.loaded_models() if type(p.model).__name__ == "ImpastoEngine"]
    assert place.model_size() == load.path.stat().st_size
    comfy.model_management.unload_all_models()
    del place
    gc.collect()
    assert resident.engine is None
    assert first() is None
    assert "ImpastoEngine" not in [type(p.model).__name__ for p in comfy.model_management.loaded_models()]
    assert resident.get(wanted) is not None
    assert load.loads == 2
    resident.drop()
    comfy.model_management.cleanup_models_gc()
    assert "ImpastoEngine" not in [type(p.model).__name__ for p in comfy.model_management.loaded_models()]


@inside_comfyui
def test_another_model_takes_its_place(folders):
    """One engine at most is held: another checkpoint, or the same name written anew, is loaded for it."""
    from impasto.comfyui.resident import Resident, Wanted

    load = Loader(folders / "small.safetensors")
    resident = Resident(load)
    first = weakref.ref(resident.get(Wanted.now(load.path, None)))
    resident.get(Wanted(None))
    assert first() is None
    assert load.loads == 2
    resident.drop()


@inside_comfyui
def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(folders):
    """After a failure there is no engine and no place in ComfyUI's list, and the next try starts anew."""
    import comfy.model_management

    from impasto.comfyui.resident import Resident, Wanted

    load = Loader(folders / "broken.safetensors")
    resident = Resident(load)
    for tries in (1, 2):
        with pytest.raises(ModelError):
            resident.get(Wanted.now(load.path, None))
        assert load.loads == tries
        assert resident.engine is None
        assert "ImpastoEngine" not in [type(p.model).__name__ for p in comfy.model_management.loaded_models() if p]


@inside_comfyui
def test_the_schema_is_the_servers(node):
    """Both SDXL nodes have the same fields with the library's own limits; only where it is drawn differs."""
    from impasto.comfyui.schema import shared_inputs, shared_outputs

    info = node.GET_NODE_INFO_V1()
    shared = [field.id for field in shared_inputs()]
    required, optional = info["input"]["required"], info["input"]["optional"]
    assert [*required, *optional] == ["checkpoint", "refiner", *shared, "acceleration"]
    assert required["width"][1] | {"min": LIMITS.side.low, "max": LIMITS.side.high, "step": 8} == required["width"][1]
    assert required["seed"][1]["control_after_generate"] is True
    assert {"builtin", "small.safetensors"} <= set(required["checkpoint"][1]["options"])
    assert info["output_name"] == [field.display_name for field in shared_outputs()]
