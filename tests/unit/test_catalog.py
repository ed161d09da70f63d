"""Model names: the built-in one, folders and files are found; anything else is told what it is, before loading."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from impasto.errors import ModelError
from impasto.models.catalog import IMAGE_PIPELINE, INPAINT_PIPELINE, PARTS, PIPELINE, find_model
from impasto.models.header import TensorInfo, read_header
from tests.random_sdxl import save_random_inpaint, save_random_refiner, save_random_sdxl

UNET = "model.diffusion_model."
BASE = {UNET + "input_blocks.0.0.weight": (320, 4, 3, 3), "conditioner.embedders.1.model.ln_final.weight": (8,)}


def folder(path, kind=PIPELINE, without=(), **index):
    """A diffusers folder with nothing inside its parts."""
    for part in set(PARTS) - set(without):
        (path / part).mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": kind, **index}))
    return str(path)


def file(path, shapes):
    """A safetensors file with these tensors."""
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return str(path)


def test_builtin_is_found():
    """The model that ships."""
    source = find_model("builtin")
    assert (source.native_side, source.kind) == (512, "base")
    assert source.index["_class_name"] == PIPELINE


def test_a_folder_is_found_by_its_path(tmp_path):
    """Any complete diffusers folder."""
    source = find_model(folder(tmp_path / "m"))
    assert source.path == tmp_path / "m"
    assert (source.native_side, source.kind) == (1024, "base")


@pytest.mark.parametrize(
    ("save", "kind"), [(save_random_sdxl, "base"), (save_random_inpaint, "inpaint"), (save_random_refiner, "refiner")]
)
def test_a_folder_says_its_kind(tmp_path, save, kind):
    """As diffusers saves each."""
    assert find_model(str(save(tmp_path / "m"))).kind == kind


def test_kinds_are_told_by_pipeline_and_channels(tmp_path):
    """An image-to-image folder without aesthetic scores is a base; a four-channel UNet does not inpaint."""
    assert find_model(folder(tmp_path / "a", IMAGE_PIPELINE)).kind == "base"
    assert find_model(folder(tmp_path / "b", IMAGE_PIPELINE, requires_aesthetics_score=True)).kind == "refiner"
    inpaint = folder(tmp_path / "c", INPAINT_PIPELINE)
    assert find_model(inpaint).kind == "inpaint"
    (tmp_path / "c" / "unet" / "config.json").write_text('{"in_channels": 4}')
    assert find_model(inpaint).kind == "base"


def test_a_refiner_folder_has_one_encoder(tmp_path):
    """What a base must have, a refiner may lack."""
    parts = {"without": ["text_encoder", "tokenizer"]}
    assert find_model(folder(tmp_path / "r", IMAGE_PIPELINE, **parts, requires_aesthetics_score=True)).kind == "refiner"
    with pytest.raises(ModelError, match="lacks text_encoder, tokenizer"):
        find_model(folder(tmp_path / "b", IMAGE_PIPELINE, **parts))


def test_what_is_not_an_sdxl_folder_is_told_so(tmp_path):
    """Each mistake has its own sentence."""
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{")
    cases = {
        "nowhere": "not found: give 'builtin', the path of a diffusers folder",
        str(tmp_path / "empty"): r"no model_index\.json",
        str(broken): "not JSON",
        folder(tmp_path / "sd15", "StableDiffusionPipeline"): "StableDiffusionPipeline, not an SDXL",
        folder(tmp_path / "part", without=["vae", "unet"]): "lacks unet, vae",
    }
    for name, phrase in cases.items():
        with pytest.raises(ModelError, match=phrase):
            find_model(name)


def test_a_file_says_its_kind(tmp_path):
    """Read off names and shapes; the data are not touched."""
    kinds = {
        "base": BASE,
        "inpaint": BASE | {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)},
        "refiner": {UNET + "x": (1,), "conditioner.embedders.0.model.ln_final.weight": (8,)},
    }
    for kind, shapes in kinds.items():
        source = find_model(file(tmp_path / f"{kind}.safetensors", shapes))
        assert (source.kind, source.index, source.native_side) == (kind, {}, 1024)


CLIP_1 = "cond_stage_model.transformer.text_model.embeddings.position_ids"
OTHERS = [
    ("a LoRA", {"lora_unet_x.lora_down.weight": (4, 8)}),
    ("a LoRA", {"unet.x.to_q.lora_A.weight": (4, 8)}),
    ("a LoRA", {"unet.x.to_q.lora_A.default.weight": (4, 8)}),
    ("a LoRA", {"base_model.model.x.to_q.lora_B.weight": (4, 8)}),
    ("a LoRA", {"unet.x.to_q.lora.down.weight": (4, 8)}),
    ("a LoRA", {"unet.x.processor.to_q_lora.down.weight": (4, 8)}),
    ("a LoRA", {"x.to_q.lora_linear_layer.up.weight": (4, 8)}),
    ("a LoRA", {"lycoris_x.hada_w1_a": (4, 8)}),
    ("a LoRA", {"x.hada_w1_b": (4, 8)}),
    ("a LoRA", {"x.lokr_w1": (4, 8)}),
    ("a LoRA", {"x.lokr_w2_a": (4, 8)}),
    ("a LoRA", {"x.oft_blocks": (4, 8, 8)}),
    ("a LoRA", {"lora_te1_x.diff": (4, 8)}),
    ("a LoRA", {"lora_unet_double_blocks_0_x.lora_down.weight": (4, 8)}),
    ("a Flux model", {"double_blocks.0.img_attn.qkv.weight": (8, 8)}),
    ("a Flux model", {UNET + "double_blocks.0.img_attn.qkv.weight": (8, 8), "text_encoders.clip_l.x": (1,)}),
    ("a Flux model", {"single_transformer_blocks.0.attn.to_q.weight": (8, 8)}),
    ("a Stable Diffusion 3 model", {UNET + "joint_blocks.0.x": (8, 8), "text_encoders.clip_g.x": (1,)}),
    ("a Stable Diffusion 3 model", {"transformer_blocks.0.attn.add_q_proj.weight": (8, 8)}),
    ("a ControlNet", {"control_model.input_blocks.0.0.weight": (8, 4)}),
    ("a ControlNet", {"controlnet_cond_embedding.conv_in.weight": (8, 4), "down_blocks.0.x": (1,)}),
    ("a ControlNet", {"lora_controlnet": (1,), "input_hint_block.0.weight": (8,)}),
    ("a ControlNet", {"lllite_unet_x.conditioning1.0.weight": (8,)}),
    ("an IP-Adapter", {"ip_adapter.1.to_k_ip.weight": (8, 8), "image_proj.norm.weight": (8,)}),
    ("a Stable Diffusion 1 checkpoint", {CLIP_1: (1, 77), UNET + "x": (1,), "first_stage_model.decoder.x": (1,)}),
    ("a Stable Diffusion 2 checkpoint", {"cond_stage_model.model.ln_final.weight": (8,), UNET + "x": (1,)}),
    ("a Wan video model", {"patch_embedding.weight": (8, 8)}),
    ("a textual-inversion embedding", {"clip_g": (2, 1280), "clip_l": (2, 768)}),
    ("a textual-inversion embedding", {"emb_params": (2, 768)}),
    ("a textual-inversion embedding", {"<cat-toy>": (768,)}),
    ("a VAE alone", {"encoder.conv_in.weight": (8,), "decoder.mid.block_1.norm1.weight": (8,)}),
    ("a VAE alone", {"decoder.mid_block.resnets.0.norm1.weight": (8,)}),
    ("a text encoder alone", {"text_model.encoder.layers.0.layer_norm1.weight": (8,)}),
    ("a Stable Diffusion 1 UNet alone in diffusers' layout", {"down_blocks.0.x.attn2.to_k.weight": (8, 768)}),
    ("a SDXL UNet without its text encoders", {UNET + "y.attn2.to_k.weight": (4, 2048)}),
    ("a Stable Diffusion 2 UNet without its text encoders", {UNET + "y.attn2.to_k.weight": (4, 1024)}),
    ("reads 8 channels", BASE | {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)}),
    ("no checkpoint we know: first of 1 tensors is 'something.else'", {"something.else": (1,)}),
]


@pytest.mark.parametrize(("kind", "shapes"), OTHERS)
def test_other_files_are_named_for_what_they_are(tmp_path, kind, shapes):
    """One sentence that says what the file is, from its header alone."""
    name = file(tmp_path / "other.safetensors", shapes)
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert kind in str(caught.value)


# As PyTorch's zipped files begin, and as its older ones do.
ZIP, PICKLE = b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}q\x00."
NOT_SAFETENSORS = {
    "model.ckpt": (PICKLE, r"a pickle \(\.ckpt\): only \.safetensors"),
    "model.pt": (ZIP, r"a pickle \(\.pt\): only \.safetensors"),
    "model.bin": (ZIP, r"a pickle \(\.bin\): only \.safetensors"),
    "model": (b"", "of unknown kind"),
    "zip.safetensors": (ZIP, "a pickle in a zip"),
    "pickle.safetensors": (PICKLE, "a pickle, which could run anything"),
    "page.safetensors": (b"\n<!DOCTYPE html>\n<html>", "an HTML page"),
    "page2.safetensors": (b"<html><body>", "an HTML page"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git-LFS pointer"),
    "error.safetensors": (b'{"error": "not allowed"}', "JSON text"),
    "other.safetensors": (b"GGUF\x03\0\0\0" + b"\0" * 60, "a GGUF file"),
    "empty.safetensors": (b"", "an empty file"),
    "short.safetensors": (b"\x10", "not a safetensors file"),
    "noise.safetensors": (b"\xff" * 100, "not a safetensors file"),
    "huge.safetensors": (b"\xff\xff\xff\xff\xff\0\0\0{" + b" " * 100, "not a safetensors file"),
    "json.safetensors": (b"\x08\0\0\0\0\0\0\0{broken!", "a broken safetensors header"),
    "deep.safetensors": ((90_000).to_bytes(8, "little") + b'{"a":' + b"[" * 89_995, "a broken safetensors header"),
    "odd.safetensors": (b"\x0c\0\0\0\0\0\0\0" + b'{"a": "b"  }', "a broken safetensors header at 'a'"),
}


@pytest.mark.parametrize("name", NOT_SAFETENSORS)
def test_what_is_no_safetensors_file_is_named(tmp_path, name):
    """By its first bytes, whatever it is called."""
    content, phrase = NOT_SAFETENSORS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=phrase):
        find_model(str(tmp_path / name))


def test_a_file_cut_anywhere_is_told_so(tmp_path):
    """In its data or its header; the whole file is not."""
    name = file(tmp_path / "m.safetensors", BASE)
    whole = (tmp_path / "m.safetensors").read_bytes()
    assert find_model(name).kind == "base"
    for size in (len(whole) - 1, len(whole) // 2, 100, 20):
        (tmp_path / "m.safetensors").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=f"is cut short: {size} of at least .* fetch it again"):
            find_model(name)


def test_a_header_that_looks_like_a_pickle_is_read(tmp_path):
    """A length of 640 bytes begins as pickles do; what follows tells them apart."""
    path = tmp_path / "m.safetensors"
    file(path, {"x" * 80: (2, 3)})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    text = path.read_bytes()[8 : 8 + length].ljust(640)
    path.write_bytes((640).to_bytes(8, "little") + text + b"\0" * 24)
    assert path.read_bytes().startswith(b"\x80\x02")
    assert read_header(path, "m") == {"x" * 80: TensorInfo("F32", (2, 3))}


def test_finding_a_model_needs_no_torch():
    """The server looks its model up without any network library."""
    code = "import sys; from impasto.models.catalog import find_model; find_model('builtin'); print('torch' in sys.modules, 'huggingface_hub' in sys.modules)"  # noqa: E501
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False False"
