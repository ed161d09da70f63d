"""What a picture and its prediction tell of how they were made: readable by other tools, whole, without secrets, and
switched off by who does not want it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from impasto.config import Settings
from impasto.images import encode_image
from impasto.metadata import MAX_PROMPT_CHARS, Ingredient, as_exif, into_png, parameters_text
from impasto.models.catalog import BUILTIN_FOLDER
from impasto.types import SCHEDULERS, GenerationRequest
from impasto.worker.backend import FakeBackend
from impasto.worker.provenance import HASHES_FILE, Provenance, plain_name
from tests.contract.conftest import Stack, read, submit

SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # as the readers in the field split


def text_of(data: bytes) -> str | None:
    """The parameters in a picture's file, read by Pillow, as other tools do."""
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG":
        image.load()
        return image.info.get("parameters")
    comment = image.getexif().get_ifd(0x8769).get(0x9286)
    if comment is None:
        return None
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def parsed(text: str) -> dict[str, str]:
    """Prompt, negative prompt and settings, taken apart as other tools do."""
    *lines, last = text.split("\n")
    prompt, negative, done = [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            done, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if done else prompt).append(line)
    found = {name: json.loads(value) if value.startswith('"') else value for name, value in SETTING.findall(last)}
    return {"prompt": "\n".join(prompt), "negative": "\n".join(negative)} | found


PROMPTS = [
    "a red fox", "ein Füchslein, 狐, 🦊", "two\nlines", 'quotes ", commas, colons: and (weights:1.2)', "x" * 20_000,
    "Steps: 3, Sampler: none", "🦊" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_other_tools_read_it_back(kind, prompt):
    """Every kind of file and of prompt: the same words and numbers come out, and the pixels are the same."""
    request = GenerationRequest(prompt, "blurry, low", 512, 640, 17, 6.5, scheduler="dpmpp_2m_karras")
    loras = [Ingredient("ink", "ab" * 32, 0.8)]
    text = parameters_text(request, 77, Ingredient("sdxl", "cd" * 32), loras, "1.2")
    image = Image.linear_gradient("L").convert("RGB")
    data = encode_image(image, kind, text)
    found = text_of(data)
    assert Image.open(io.BytesIO(data)).tobytes() == Image.open(io.BytesIO(encode_image(image, kind))).tobytes()
    if kind != "png" and len(text.encode("utf-16-be")) > 60_000:
        assert text.startswith(found)  # what a JPEG has no room for is cut
        return
    assert found == text
    values = parsed(found)
    shown = prompt if len(prompt) <= MAX_PROMPT_CHARS else prompt[:MAX_PROMPT_CHARS] + "…"
    assert (values["prompt"], values["negative"]) == (f"{shown} <lora:ink:0.8>", "blurry, low")
    assert (values["Steps"], values["Sampler"], values["Schedule type"]) == ("17", "DPM++ 2M", "Karras")
    assert (values["CFG scale"], values["Seed"], values["Size"]) == ("6.5", "77", "512x640")
    assert (values["Model"], values["Model hash"]) == ("sdxl", "cd" * 5)
    assert json.loads(values["Hashes"]) == {"lora:ink": "ab" * 5, "model": "cd" * 5}
    assert "Denoising strength" not in values and "Acceleration" not in values


def test_an_approximate_picture_says_so():
    """What was left out for speed changes the picture, so it is told; exact is not."""
    text = parameters_text(GenerationRequest("x", acceleration="fast"), 1, Ingredient("m"), (), "1")
    assert parsed(text)["Acceleration"] == "fast"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_has_a_name_that_others_know(scheduler):
    """None is told by our own spelling, which has underscores."""
    text = parameters_text(GenerationRequest("x", scheduler=scheduler), 1, Ingredient("m"), (), "1")
    assert "_" not in parsed(text)["Sampler"]


def test_the_text_stands_behind_the_header_of_a_png():
    """One chunk with a right checksum, before the pixels; Latin-1 as tEXt, else as UTF-8 in iTXt."""
    data = encode_image(Image.new("RGB", (8, 8)), "png")
    for text, kind in (("fox", b"tEXt"), ("狐", b"iTXt")):
        told = into_png(data, text)
        (length,) = struct.unpack(">I", told[33:37])
        assert told[37:41] == kind
        assert told[:33] + told[33 + 12 + length :] == data
        Image.open(io.BytesIO(told)).verify()


def test_exif_of_any_text_fits():
    """Also where it must be cut, and never within a character."""
    for text in ("x" * 50_000, "🦊" * 50_000, "x" + "🦊" * 50_000):
        assert len(as_exif(text)) < 65_000
        data = encode_image(Image.new("RGB", (8, 8)), "jpeg", text)
        assert text.startswith(text_of(data))


# Through the service


def lora_file(path: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def working(stack: Stack) -> AbstractContextManager[None]:
    """A worker as the process makes it, but for the network."""
    return stack.worker(FakeBackend(0.0), provenance=Provenance.of(stack.settings, "cpu"))


def finished(stack: Stack, **body: Any) -> dict[str, Any]:
    client = stack.client()
    prediction = submit(client, enable_sync_mode=True, num_inference_steps=2, **body)
    data = read(client, prediction)
    assert data["status"] == "completed", data["error"]
    return data


def test_a_prediction_says_what_it_takes_to_make_it_again(serve):
    """Weights by their hashes, programs by their versions, device, format, seeds, and all that was asked for."""
    with serve(model="builtin", dtype="float32") as stack:
        sha256 = lora_file(stack.settings.lora_dir / "styles" / "ink.safetensors")
        with working(stack):
            data = finished(
                stack, seed=5, num_images=2, loras=[{"path": "styles/ink", "scale": 0.5}], negative_prompt="grey"
            )
        told = data["reproduce"]
        assert told["programs"] == {n: version(n) for n in ("impasto", "torch", "diffusers", "transformers")}
        assert (told["device"], told["dtype"], told["seeds"]) == ("cpu", "float32", [5, 6])
        assert told["loras"] == [{"source": "folder:styles/ink.safetensors", "sha256": sha256, "scale": 0.5}]
        files = sorted(BUILTIN_FOLDER.glob("*/*.safetensors"))
        lines = [
            f"{f.relative_to(BUILTIN_FOLDER).as_posix()} {hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in files
        ]
        assert lines
        assert told["model"] == {"name": "builtin", "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
        asked = GenerationRequest.from_json(told["request"] | {"seed": told["seeds"][0]})
        assert (asked.prompt, asked.negative_prompt, asked.num_inference_steps) == ("a red fox", "grey", 2)
        for url, seed in zip(data["outputs"], told["seeds"], strict=True):
            values = parsed(text_of(httpx.get(url).content))
            assert (values["Seed"], values["prompt"]) == (str(seed), "a red fox <lora:ink:0.5>")
            assert json.loads(values["Hashes"])["lora:ink"] == sha256[:10]


def test_start_pictures_stand_in_the_record_by_their_pixels(serve):
    """The same picture gives the same hash, in whatever file it came."""
    with serve(model="fake") as stack, working(stack):
        image, hashes = Image.linear_gradient("L").convert("RGB"), set()
        for kind in ("PNG", "BMP"):
            buffer = io.BytesIO()
            image.save(buffer, kind)
            text = __import__("base64").b64encode(buffer.getvalue()).decode()
            data = finished(stack, image=text, strength=0.5)
            hashes.add(data["reproduce"]["pictures"]["image"])
            assert parsed(text_of(httpx.get(data["outputs"][0]).content))["Denoising strength"] == "0.5"
        assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    ("settings", "body", "embedded", "recorded"),
    [
        ({}, {}, True, True),
        ({}, {"enable_metadata": False}, False, True),
        ({"embed_metadata": False}, {"enable_metadata": True}, False, True),
        ({"reproduction_record": False}, {}, True, False),
        ({"embed_metadata": False, "reproduction_record": False}, {}, False, False),
    ],
)
def test_each_can_be_switched_off(serve, kind, settings, body, embedded, recorded):
    """By the operator, and what is in the files by the request, too. Nothing else changes."""
    with serve(model="fake", **settings) as stack, working(stack):
        data = finished(stack, output_format=kind, **body)
        assert (text_of(httpx.get(data["outputs"][0]).content) is not None) == embedded
        assert ("reproduce" in data) == recorded


def test_nothing_secret_gets_in(serve, tmp_path):
    """No folder of this machine, no address with a token, no key: not in a file, not in the record."""
    folder = tmp_path / "secret-folder"
    folder.mkdir()
    shipped = BUILTIN_FOLDER / "unet" / next(BUILTIN_FOLDER.glob("unet/*.safetensors")).name
    (folder / "model.safetensors").symlink_to(shipped)
    with serve(model="fake") as stack:
        lora_file(stack.settings.lora_dir / "ink.safetensors")
        sneaky = Settings(data_dir=stack.settings.data_dir, model=str(folder / "sentinel" / "nothing-there"))
        assert Provenance.of(sneaky, "cpu")._model == Ingredient("nothing-there")
        with working(stack):
            data = finished(stack, loras=[{"path": "ink"}])
        shown = json.dumps(data["reproduce"]) + text_of(httpx.get(data["outputs"][0]).content)
        for secret in (str(tmp_path), str(stack.settings.data_dir), stack.key, "secret-folder"):
            assert secret not in shown


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ink", "ink"), ("styles/ink.safetensors", "ink"), ("https://h.example/a/ink.safetensors?token=s3cret", "ink"),
        ("https://user:s3cret@h.example/ink.safetensors#x", "ink"), ("C:\\loras\\ink.safetensors", "ink"),
        ("owner/ink@main", "ink@main"), ("a b:<c>,d", "a_b_c_d"), ("https://h.example/", "h.example"),
        ("///", "unnamed"), ("https://h.example/x/trained_model.tar", "trained_model"),
    ],
)  # fmt: skip
def test_a_lora_is_called_by_its_last_word(path, name):
    """Without folder, host, query or anything that would break the text apart."""
    assert plain_name(path) == name


def test_a_models_file_is_hashed_once(tmp_path, monkeypatch):
    """The hash is kept, and made anew when the file changes."""
    file = tmp_path / "model.safetensors"
    file.write_bytes((BUILTIN_FOLDER / "vae" / next(BUILTIN_FOLDER.glob("vae/*.safetensors")).name).read_bytes())
    from impasto.worker import provenance

    known, reads = provenance._KnownHashes(tmp_path / HASHES_FILE), []
    first = known.of(file)
    assert first == hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(provenance, "_file_hash", lambda path: reads.append(path) or "new")
    assert provenance._KnownHashes(tmp_path / HASHES_FILE).of(file) == first
    assert reads == []
    file.write_bytes(b"other")
    assert provenance._KnownHashes(tmp_path / HASHES_FILE).of(file) == "new"
    (tmp_path / HASHES_FILE).write_text("not json")
    assert provenance._KnownHashes(tmp_path / HASHES_FILE).of(file) == "new"
