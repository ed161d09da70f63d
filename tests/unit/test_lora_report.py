"""What a LoRA file is and what it did, said in words that help: report, base model, inspection, command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from impasto.lora.base_model import base_model, describe
from impasto.lora.bundles import Bundle
from impasto.lora.contents import LoraContents, Mismatch
from impasto.lora.gate import Header
from impasto.lora.inspect import inspect_lora
from impasto.lora.keys import Target
from impasto.lora.patch import LowRank
from impasto.lora.report import SHOWN, LoraReport
from impasto.models.catalog import find_model
from impasto.models.networks import Dtypes, load_networks
from impasto.models.shapes import parameter_shapes
from impasto.tensorfile import TensorInfo
from tests.random_sdxl import save_random_sdxl
from tests.single_file import save_single_file

SDXL_BLOCK = "lora_unet_input_blocks_4_1_transformer_blocks_0"


def header(metadata=None, **shapes):
    """A header with these tensors; ``__`` in a name stands for a dot."""
    tensors = {key.replace("__", "."): TensorInfo("F16", tuple(shape)) for key, shape in shapes.items()}
    return Header(tensors, metadata or {})


def pair(module, inputs, outputs=64, rank=4):
    """The two halves of a low-rank pair, as shapes."""
    return {f"{module}__lora_down__weight": (rank, inputs), f"{module}__lora_up__weight": (outputs, rank)}


WHAT = {
    "an SDXL LoRA": header(**pair(f"{SDXL_BLOCK}_attn2_to_k", 2048)),
    "an SDXL refiner LoRA": header(**pair(f"{SDXL_BLOCK}_attn2_to_k", 1280)),
    "an SD 1.5 LoRA": header(**pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 768)),
    "an SD 2 LoRA": header(**pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v", 1024)),
    "a Flux LoRA": header(**pair("lora_unet_double_blocks_0_img_attn_qkv", 3072)),
    "a Wan LoRA": header(**pair("diffusion_model__blocks__0__cross_attn__k", 5120)),
    "an SD 3 LoRA": header(**pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536)),
    "a LoRA": header(**pair("unet__conv_in", 36)),
    "a ControlNet": header(control_model__input_hint_block__0__weight=(16, 3, 3, 3)),
    "a whole SDXL checkpoint": header(
        model__diffusion_model__out__2__weight=(4, 320, 3, 3),
        conditioner__embedders__1__model__ln_final__weight=(1280,),
    ),
    "a whole SD 1.5 checkpoint": header(
        model__diffusion_model__out__2__weight=(4, 320, 3, 3),
        cond_stage_model__transformer__text_model__final_layer_norm__weight=(768,),
    ),
    "a textual inversion": header(clip_l=(2, 768), clip_g=(2, 1280)),
}


@pytest.mark.parametrize("what", WHAT)
def test_a_file_is_told_from_its_header(what):
    """By the names that only one family has, and the width that cross-attention reads."""
    assert describe(WHAT[what]) == what


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({f"{SDXL_BLOCK}_attn2_to_k__hada_w1_b": (4, 2048), f"{SDXL_BLOCK}_attn2_to_k__hada_w1_a": (640, 4)}, "SDXL"),
        ({f"{SDXL_BLOCK}_attn2_to_k__lokr_w1": (8, 8), f"{SDXL_BLOCK}_attn2_to_k__lokr_w2": (80, 256)}, "SDXL"),
        ({f"{SDXL_BLOCK}_attn2_to_k__lokr_w1": (8, 8), f"{SDXL_BLOCK}_attn2_to_k__lokr_w2_b": (4, 96)}, "SD 1.5"),
        ({f"{SDXL_BLOCK}_attn2_to_k__diff": (640, 2048)}, "SDXL"),
    ],
)
def test_other_kinds_tell_their_base_too(shapes, family):
    """By the part that is as wide as the input, or by two factors together."""
    assert base_model(header(**shapes)) == family


def test_metadata_count_only_where_shapes_are_silent():
    """Trainers' notes are often wrong: a width of 2048 is SDXL whatever they say."""
    wrong = {"ss_base_model_version": "sd_v1"}
    assert base_model(header(wrong, **pair(f"{SDXL_BLOCK}_attn2_to_k", 2048))) == "SDXL"
    assert base_model(header(wrong, **pair("unet__conv_in", 36))) == "SD 1.5"
    assert base_model(header(**pair("unet__conv_in", 36))) == "unknown"


def contents(**more):
    """A LoRA for two modules of the UNet (one with its bias) and one of a text encoder."""
    patch, other = LowRank(torch.ones(4, 8), torch.ones(8, 4), 1.0), LowRank(torch.ones(2, 8), torch.ones(8, 2), 1.0)
    patches = {
        Target("unet", "a"): patch,
        Target("unet", "a", "bias"): patch,
        Target("unet", "b"): other,
        Target("text_encoder", "a"): patch,
    }
    return LoraContents(patches, base_model="SDXL", trigger_words=("pixl",), sha256="ab" * 32, **more)


def test_a_report_counts_modules_once():
    """A weight and its bias are one module; ranks are the smallest and the largest."""
    report = LoraReport.of(contents(), "fox", 0.8, 2)
    assert report.to_json() == {
        "path": "fox",
        "scale": 0.8,
        "applied": {"unet": 2, "text_encoder": 1},
        "kinds": {"LoRA": 3},
        "ranks": [2, 4],
        "mismatched": {"count": 0, "first": []},
        "unmatched": {"count": 0, "first": []},
        "ignored": {"count": 0, "first": []},
        "embeddings": [],
        "base_model": "SDXL",
        "trigger_words": ["pixl"],
        "sha256": "ab" * 32,
        "warnings": [],
    }
    assert (report.position, report.modules) == (2, 3)
    assert report.line() == (
        "'fox' at 0.8: LoRA of rank 2 to 4 on 3 modules (unet 2, text_encoder 1), sha256 abababababab"
    )


def test_what_was_left_out_is_counted_and_shown_in_part():
    """Ten of a thousand, cut to a length; JSON stays small whatever the file holds, and a sentence says so."""
    mismatched = tuple(Mismatch(f"m{i}", (i + 1, 2), (3, 4)) for i in range(2))
    bundles = tuple(Bundle(f"fox{i}" * 100, (), problem="is no vector") for i in range(11))
    left = contents(unmatched=("x" * 10_000,) * 1000, mismatched=mismatched, ignored=("a",), bundles=bundles)
    report = LoraReport.of(left, "fox")
    shown = report.to_json()
    assert (shown["unmatched"]["count"], len(shown["unmatched"]["first"])) == (1000, SHOWN)
    assert shown["mismatched"]["first"][1] == {"module": "m1", "file_shape": [2, 2], "model_shape": [3, 4]}
    assert len(json.dumps(shown)) < 7000
    weaker, unused = shown["warnings"]
    assert weaker == "1002 of its 1005 modules do not fit this model and were left out, so it may look weaker."
    assert unused.startswith("Each of the embeddings for 'fox0fox0")
    assert unused.endswith(" and 1 more that it brings was not applied: it is no vector.")
    rows = dict(report.rows())
    assert rows["mismatched"] == "2\nm0: file [1, 2], model [3, 4]\nm1: file [2, 2], model [3, 4]"
    assert rows["unmatched"].endswith("… and 990 more")
    assert "1000 unmatched, 2 mismatched, 1 ignored" in report.line()


def test_an_alias_another_base_and_a_scale_of_zero_are_said():
    """Sentences for what the user may not expect; the alias comes first."""
    foreign = LoraContents(contents().patches, base_model="SD 1.5")
    report = LoraReport.of(foreign, "/srv/data/a.safetensors", 0).named("nerijs/pixel", "shipped:pixel", "pixel")
    assert report.warnings == (
        "'nerijs/pixel' stands for 'pixel' on this server.",
        "It was made for SD 1.5; what it does here is not what its trainer saw.",
        "Its scale is 0, so it does nothing.",
    )
    assert (report.to_json()["resolved"], report.to_json()["alias_of"]) == ("shipped:pixel", "pixel")
    assert "/srv" not in json.dumps(report.to_json()) + report.line() + str(report.rows())
    assert LoraReport.unused("fox", 3).to_json()["warnings"] == ["Its scale is 0, so it does nothing."]


def test_a_line_is_one_line():
    """A name cannot forge a second line of the log."""
    assert "\n" not in LoraReport.of(contents(), "a\nERROR b").line()


def test_the_report_and_the_gate_need_no_torch():
    """They travel through processes that have none loaded."""
    code = (
        "import sys, impasto.lora.gate, impasto.lora.report, impasto.lora.base_model, impasto.cli\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def builtin():
    """Names and shapes of the built-in model."""
    return parameter_shapes(find_model("builtin"))


def test_names_and_shapes_are_those_of_the_loaded_networks(tmp_path):
    """Every linear, convolution and norm, no embedding table; read off the headers alone."""
    source = find_model(str(save_random_sdxl(tmp_path / "model")))
    shapes = parameter_shapes(source)
    networks = load_networks(source, Dtypes.all(torch.float32))
    loaded = dict(zip(("text_encoder", "text_encoder_2"), networks.text_encoders, strict=True)) | {
        "unet": networks.unet
    }
    patchable = torch.nn.Linear | torch.nn.Conv2d | torch.nn.LayerNorm | torch.nn.GroupNorm
    assert shapes.keys() == loaded.keys()
    for network, root in loaded.items():
        found = {
            strip(f"{name}.{part}"): tuple(value.shape)
            for name, module in root.named_modules()
            if isinstance(module, patchable)
            for part, value in module.named_parameters(recurse=False)
        }
        assert {strip(name): shape for name, shape in shapes[network].items()} == found


def test_a_single_file_has_the_names_and_shapes_of_its_folder(tmp_path):
    """The original names are translated, the fused projections of the second encoder taken apart."""
    folder = find_model(str(save_random_sdxl(tmp_path / "model")))
    networks = load_networks(folder, Dtypes.all(torch.float32))
    path = save_single_file(tmp_path / "model.safetensors", networks.unet, networks.vae, *networks.text_encoders)
    shapes = [
        {network: {strip(name): shape for name, shape in found.items()} for network, found in each.items()}
        for each in (parameter_shapes(folder), parameter_shapes(find_model(str(path))))
    ]
    assert shapes[0] == shapes[1]


def strip(name):
    """Without the word that one version of transformers writes and the next does not."""
    return name.removeprefix("text_model.")


def fitting(shapes):
    """Tensors of a LoRA on every cross-attention of a model's UNet."""
    tensors = {}
    for name, shape in shapes["unet"].items():
        if "attn2" in name and name.endswith(".weight") and len(shape) == 2:
            module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{module}.lora_down.weight"] = torch.ones(4, shape[1])
            tensors[f"{module}.lora_up.weight"] = torch.ones(shape[0], 4)
    return tensors


def test_an_inspection_counts_what_applies(tmp_path, builtin):
    """Every module of a file that was made for the model, and what its author wrote down."""
    tensors = fitting(builtin)
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"modelspec.trigger_phrase": "pixl"})
    found = inspect_lora(tmp_path / "lora.safetensors", "lora", builtin)
    assert found.problem is None
    assert found.report.applied == {"unet": len(tensors) // 2}
    assert (found.report.kinds, found.report.ranks) == ({"LoRA": len(tensors) // 2}, (4, 4))
    assert found.report.trigger_words == ("pixl",)
    assert len(found.report.sha256) == 64


def sdxl_file(path):
    """A LoRA with the widths of the real SDXL."""
    module = f"{SDXL_BLOCK}_attn2_to_k"
    save_file({f"{module}.lora_down.weight": torch.ones(4, 2048), f"{module}.lora_up.weight": torch.ones(640, 4)}, path)
    return path


def test_a_lora_for_the_real_sdxl_is_told_though_the_model_is_another(tmp_path, builtin):
    """It does not apply to the built-in model, and the reason is its size, not its kind."""
    found = inspect_lora(sdxl_file(tmp_path / "lora.safetensors"), "lora", builtin)
    assert found.what == "an SDXL LoRA"
    assert "SDXL" in found.problem
    assert (found.report.base_model, found.report.applied) == ("SDXL", {})


def impasto(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IMPASTO_")}
    command = [Path(sys.executable).with_name("impasto"), "lora", "inspect", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_says_it_in_words_in_json_and_in_its_exit_status(tmp_path, builtin):
    """0: applies; 1: does not, and why; 2: a wrong command. A hostile file is one sentence, in JSON too."""
    good, page = tmp_path / "good.safetensors", tmp_path / "page.safetensors"
    save_file(fitting(builtin), good)
    page.write_bytes(b"<html>Log in</html>")
    applies = impasto(good)
    assert applies.returncode == 0, applies.stderr
    assert "applies to builtin" in applies.stdout
    other = impasto(sdxl_file(tmp_path / "sdxl.safetensors"), "--json")
    assert other.returncode == 1, other.stderr
    told = json.loads(other.stdout)
    assert (told["what"], told["applies"], told["model"]) == ("an SDXL LoRA", False, "builtin")
    refused = impasto(page)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is an HTML page" in refused.stderr and "Traceback" not in refused.stderr
    assert json.loads(impasto(page, "--json").stdout)["applies"] is False
    assert impasto().returncode == 2
