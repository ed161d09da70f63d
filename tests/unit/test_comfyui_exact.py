"""*Load LoRA, exact*: every name is found, and what is put on ComfyUI's models survives all that ComfyUI does to it.

The second half runs inside ComfyUI; how right the numbers are for every kind is ``tests/comfyui/exact_table.py``'s.
"""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from impasto.comfyui.names import read_names
from impasto.comfyui.reporting import report_text
from impasto.errors import InvalidInput, LoraError, ModelError
from impasto.lora.keys import Target
from impasto.lora.report import LoraReport
from impasto.lora.weights import Weights
from tests.comfyui.inside import SETTING, comfyui_folder, enter_comfyui
from tests.parity.lora.adapters import ALPHAS
from tests.parity.lora.files import write_case
from tests.parity.lora.networks import networks
from tests.single_file import unet_original

inside_comfyui = pytest.mark.skipif(
    comfyui_folder() is None, reason=f"set {SETTING} to a folder of ComfyUI and run with its Python"
)
TO_Q = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
NAME = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
TEXT_NAME = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
TEXT_KEY = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
UNET_WIDTH, TEXT_WIDTH = 16, 16


def _names_of_networks():
    """ComfyUI's names as its documentation of checkpoints has them, made from our networks by the tests' own table."""
    modules = networks().modules
    attended = {i for i, kind in enumerate(modules["unet"].config.up_block_types) if "CrossAttn" in kind}
    unet = {name: tensor.shape for name, tensor in modules["unet"].state_dict().items()}
    diffusers = {name: unet_original(name, attended) for name in unet}
    clip = {}
    for encoder, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        for name, tensor in modules[encoder].state_dict().items():
            rest = name if name.startswith("text_projection") else f"text_model.{name.removeprefix('text_model.')}"
            clip[f"{prefix}.transformer.{rest}"] = tuple(tensor.shape)
    theirs = {f"diffusion_model.{diffusers[name]}": tuple(shape) for name, shape in unet.items()}
    return theirs, diffusers, clip


def _plain(target: Target) -> Target:
    return Target(target.network, target.module.removeprefix("text_model."), target.parameter)


def test_every_weight_that_our_engine_patches_has_a_name_in_comfyui():
    """No parameter of the UNet and of both text encoders is left without a name, and none gets another one's shape."""
    found = read_names(*_names_of_networks())
    ours = {_plain(target): tuple(shape) for target, shape in Weights(networks().modules).shapes().items()}
    assert {_plain(target): shape for target, shape in found.shapes.items()} == ours
    assert len(set(found.keys.values())) == len(ours) == len(found.keys)


def test_what_sdxl_does_not_use_has_no_name():
    """Tables of words, the first encoder's projection and the label embedding's other name are not patched."""
    unet, diffusers, clip = _names_of_networks()
    more = {"class_embedding.linear_1.weight": "label_emb.0.0.weight", "mid_block.nothing.weight": "nowhere.weight"}
    unused = {"clip_l.transformer.text_projection.weight": (16, 16), "clip_l.logit_scale": ()}
    assert read_names(unet, diffusers | more, clip | unused) == read_names(unet, diffusers, clip)


def test_a_refiner_is_the_refiner():
    """A LoRA made for the refiner finds it, and the base's UNet is not its."""
    unet, diffusers, _ = _names_of_networks()
    assert {target.network for target in read_names(unet, diffusers, {}, "refiner").keys} == {"refiner"}


def test_the_report_is_a_paragraph_a_lora():
    """Line first, warnings below it, an empty line between two; no LoRA at all is said too."""
    first = LoraReport("a", 0.5, kinds={"DoRA": 3}, ranks=(4, 4), applied={"unet": 3}, warnings=("Beware.",))
    text = report_text([first, LoraReport.unused("b")])
    assert text.splitlines()[0] == first.line()
    assert "  warning: Beware." in text
    assert text.split("\n\n")[1].startswith("'b' at 0")
    assert report_text([]) == "No LoRA."


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """ComfyUI's folder of LoRAs."""
    folder = tmp_path_factory.mktemp("loras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enter_comfyui()
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(folder), is_default=True)
    return folder


@pytest.fixture(scope="module")
def loaded(loras):
    """A small SDXL, loaded by ComfyUI."""
    from tests.comfyui.models import load_small

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_small()


def dora(path: Path, seed: int = 0, name: str = NAME, width: int = UNET_WIDTH) -> Path:
    """A DoRA of one linear, which no order but the right one makes right."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "lora_down.weight": torch.randn(2, width, generator=draw),
        "lora_up.weight": torch.randn(width, 2, generator=draw),
        "dora_scale": torch.rand(width, 1, generator=draw) + 0.5,
        "alpha": torch.tensor(1.0),
    }
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, path)
    return path


def dora_formula(path: Path, weight: torch.Tensor, strength: float, name: str = NAME) -> torch.Tensor:
    """What the file makes of a weight, float64."""
    from safetensors.torch import load_file

    parts = {key.removeprefix(f"{name}."): tensor.double() for key, tensor in load_file(path).items()}
    weight = weight.double()
    moved = weight + parts["lora_up.weight"] @ parts["lora_down.weight"] / 2
    whole = parts["dora_scale"] * moved / moved.norm(dim=1, keepdim=True)
    return weight + strength * (whole - weight)


def apply(loaded, *stack):
    """The node's work."""
    from impasto.comfyui.exact import apply_stack
    from impasto.comfyui.stack import StackedLora

    return apply_stack(loaded.model, loaded.clip, [StackedLora(*item) for item in stack])


@torch.inference_mode()
def weight_with(patcher, key: str = TO_Q) -> torch.Tensor:
    """A weight while ComfyUI has a model loaded to draw with."""
    import comfy.model_management

    try:
        comfy.model_management.load_models_gpu([patcher])
        return patcher.model.state_dict()[key].clone()
    finally:
        comfy.model_management.unload_all_models()


def own(loaded, key: str = TO_Q) -> torch.Tensor:
    return loaded.model.model.state_dict()[key].clone()


@inside_comfyui
def test_it_is_taken_off_again_bit_for_bit(loaded, loras):
    """What goes in comes out as it was, and so are its weights when ComfyUI has taken the LoRA off."""
    dora(loras / "a.safetensors")
    before = {key: tensor.clone() for key, tensor in loaded.model.model.state_dict().items()}
    model, _, _ = apply(loaded, ("a.safetensors", 1.0, 1.0))
    assert not torch.equal(weight_with(model), before[TO_Q])
    assert loaded.model.patches == {}
    for key, tensor in loaded.model.model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert torch.equal(weight_with(loaded.model), before[TO_Q])


@inside_comfyui
def test_one_node_after_another_is_the_stack(loaded, loras):
    """Two nodes in a chain, with strengths of their own, are one node with a stack, bit for bit: each LoRA acts on
    what the one before left."""
    files = [dora(loras / f"chain{i}.safetensors", seed=i) for i in range(2)]
    first, clip, _ = apply(loaded, ("chain0.safetensors", 0.5, 1.0))
    chained, _, _ = apply(SimpleNamespace(model=first, clip=clip), ("chain1.safetensors", -1.5, 1.0))
    stacked, _, _ = apply(loaded, ("chain0.safetensors", 0.5, 1.0), ("chain1.safetensors", -1.5, 1.0))
    swapped, _, _ = apply(loaded, ("chain1.safetensors", -1.5, 1.0), ("chain0.safetensors", 0.5, 1.0))
    wanted = dora_formula(files[1], dora_formula(files[0], own(loaded), 0.5), -1.5)
    assert torch.equal(weight_with(chained), weight_with(stacked))
    torch.testing.assert_close(weight_with(chained).double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weight_with(swapped).double(), wanted, rtol=1e-2)
    assert len(chained.patches[TO_Q]) == 1  # one adapter, so that nothing is rounded in between
    assert torch.equal(weight_with(first), weight_with(apply(loaded, ("chain0.safetensors", 0.5, 1.0))[0]))


@inside_comfyui
def test_it_follows_comfyuis_own_loader(loaded, loras):
    """A LoRA of ComfyUI's node before ours stays where it was: ours acts on what it left."""
    import comfy.sd

    case = write_case(networks(), loras / "plain.safetensors", "LoRA", "kohya, original names", ALPHAS[0])
    assert case is not None
    delta = {f"{NAME}.lora_up.weight": torch.randn(16, 2), f"{NAME}.lora_down.weight": torch.randn(2, 16)}
    before, clip = comfy.sd.load_lora_for_models(loaded.model, loaded.clip, delta, 0.7, 0.7)
    file = dora(loras / "after.safetensors")
    model, _, _ = apply(SimpleNamespace(model=before, clip=clip), ("after.safetensors", 1.0, 1.0))
    moved = own(loaded).double() + 0.7 * (delta[f"{NAME}.lora_up.weight"] @ delta[f"{NAME}.lora_down.weight"]).double()
    torch.testing.assert_close(weight_with(model).double(), dora_formula(file, moved, 1.0), rtol=1e-5, atol=1e-5)


@inside_comfyui
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_are_kept_off_the_device(loras, dtype):
    """Where ComfyUI has no memory for a layer it patches at every call, in the layer's format: rounded once."""
    import comfy.ops

    from tests.comfyui.models import load_small

    loaded = load_small(dtype)
    files = [dora(loras / f"low{i}.safetensors", seed=i) for i in range(2)]
    model, _, _ = apply(loaded, *((file.name, 1.0, 1.0) for file in files))
    layer = model.get_model_object(TO_Q.removesuffix(".weight"))
    before = layer.weight.detach().clone()
    wanted = dora_formula(files[1], dora_formula(files[0], before, 1.0), 1.0)
    model.load(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert layer.weight_function
        assert torch.equal(layer.weight, before)
        weight, _ = comfy.ops.cast_bias_weight(layer, dtype=dtype, device=torch.device("cpu"))
    finally:
        model.unpatch_model()
    assert weight.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.double(), wanted, rtol=0.51 * step + 1e-6, atol=1e-6)


@inside_comfyui
def test_a_model_in_eight_bits(loras):
    """The patch is worked out in float32 on the weight as it is in float8; ComfyUI rounds it by its own dice."""
    from tests.comfyui.models import load_small

    loaded = load_small(torch.float8_e4m3fn)
    file = dora(loras / "eight.safetensors")
    before = own(loaded)
    assert before.dtype == torch.float8_e4m3fn
    model, _, _ = apply(loaded, (file.name, 1.0, 1.0))
    found, wanted = weight_with(model), dora_formula(file, before.float(), 1.0)
    assert found.dtype == torch.float8_e4m3fn
    assert ((found.double() - wanted).abs() <= wanted.abs() / 8 + 2**-9).all()  # one step of three bits of fraction
    assert (found.double() - before.double()).abs().max() > 0.1


@inside_comfyui
def test_strengths_are_of_each_half(loaded, loras):
    """One strength is for the UNet, one for the text encoders; at 0 that half is left alone, and the report says so."""
    both = dora(loras / "unet.safetensors"), dora(loras / "text.safetensors", name=TEXT_NAME, width=TEXT_WIDTH)
    text_own = loaded.clip.cond_stage_model.state_dict()[TEXT_KEY].clone()
    model, clip, reports = apply(loaded, ("unet.safetensors", 0.0, 1.0), ("text.safetensors", 0.0, 0.5))
    assert model.patches == {}
    found = weight_with(clip.patcher, TEXT_KEY).double()
    torch.testing.assert_close(found, dora_formula(both[1], text_own, 0.5, TEXT_NAME), rtol=1e-5, atol=1e-6)
    assert [report.applied for report in reports] == [{}, {"text_encoder": 1}]
    _, _, [skipped] = apply(loaded, ("nowhere.safetensors", 0.0, 0.0))
    assert skipped.warnings == ("Its scale is 0, so it does nothing.",)


@inside_comfyui
def test_without_clip_the_report_says_so(loaded, loras):
    """A LoRA for the UNet works without a CLIP; what was for the text encoders is told."""
    dora(loras / "a.safetensors")
    model, clip, [report] = apply(SimpleNamespace(model=loaded.model, clip=None), ("a.safetensors", 1.0, 1.0))
    assert clip is None
    assert TO_Q in model.patches
    assert "No CLIP is connected" in report_text([report])


@inside_comfyui
def test_hooks_and_copies(loaded, loras):
    """ComfyUI's hooks scale a patch, and its later releases copy an adapter from two attributes: both work."""
    file = dora(loras / "a.safetensors")
    model, _, _ = apply(loaded, ("a.safetensors", 1.0, 1.0))
    [(_, adapter, *_)] = model.patches[TO_Q]
    copied = type(adapter)(adapter.loaded_keys, adapter.weights)
    found = copied.calculate_weight(own(loaded), TO_Q, 0.25, 1.0, None, None)
    torch.testing.assert_close(found.double(), dora_formula(file, own(loaded), 0.25), rtol=1e-5, atol=1e-6)


@inside_comfyui
def test_merged_models_keep_it(loaded, loras):
    """ComfyUI's merge of two models takes the patched weight of each."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    file = dora(loras / "a.safetensors")
    model, _, _ = apply(loaded, ("a.safetensors", 1.0, 1.0))
    [merged] = ModelMergeSimple().merge(loaded.model, model, 0.25)
    wanted = 0.25 * own(loaded).double() + 0.75 * dora_formula(file, own(loaded), 1.0)
    torch.testing.assert_close(weight_with(merged).double(), wanted, rtol=1e-5, atol=1e-6)


@inside_comfyui
def test_what_would_do_nothing_is_an_error(loaded, loras):
    """A file that is missing, broken, for another base or without effect stops the workflow, and is named."""
    wide = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{wide}.lora_down.weight": torch.ones(1, 768), f"{wide}.lora_up.weight": torch.ones(320, 1)},
              loras / "sd15.safetensors")  # fmt: skip
    save_file({f"{NAME}.lora_down.weight": torch.full((1, 16), float("nan")), f"{NAME}.lora_up.weight":
               torch.ones(16, 1)}, loras / "nan.safetensors")  # fmt: skip
    save_file({"transformer.blocks.0.lora_A.weight": torch.ones(1, 8)}, loras / "none.safetensors")
    (loras / "html.safetensors").write_text("<html>log in</html>")
    for name, problem in (
        ("sd15.safetensors", "SD 1.5"), ("nan.safetensors", "not finite"), ("none.safetensors", "none.safetensors"),
        ("html.safetensors", "html"), ("gone.safetensors", "loras folders"),
    ):  # fmt: skip
        with pytest.raises(LoraError, match=problem) as caught:
            apply(loaded, (name, 1.0, 1.0))
        assert name in str(caught.value)


@inside_comfyui
def test_another_model_is_refused(loaded):
    """A MODEL that is not SDXL is said to be none."""
    with pytest.raises(ModelError, match="connect SDXL"):
        apply(SimpleNamespace(model=loaded.clip.patcher, clip=loaded.clip))


@inside_comfyui
def test_numbers_past_the_format_stop_the_loading(loras):
    """A strength that makes weights infinite in the model's format is an error when ComfyUI loads the model, which
    can be used again at once."""
    import comfy.model_management

    from tests.comfyui.models import load_small

    loaded = load_small(torch.float16)
    before = own(loaded)
    save_file({f"{NAME}.lora_down.weight": torch.full((1, 16), 200.0), f"{NAME}.lora_up.weight": torch.full((16, 1),
               200.0)}, loras / "loud.safetensors")  # fmt: skip
    model, _, _ = apply(loaded, ("loud.safetensors", 2.0, 1.0))
    with pytest.raises(LoraError, match=r"loud\.safetensors.*lower its strength"):
        comfy.model_management.load_models_gpu([model])
    comfy.model_management.load_models_gpu([loaded.model])
    assert torch.equal(own(loaded), before)
    comfy.model_management.unload_all_models()


@inside_comfyui
def test_the_node(loaded, loras):
    """Fields, outputs and the stack that it hands on; a file that is written anew makes it run again."""
    from impasto.comfyui.exact import LoadLoraExact

    dora(loras / "a.safetensors")
    dora(loras / "b.safetensors", seed=1)
    schema = LoadLoraExact.GET_SCHEMA()
    assert schema.node_id == "ImpastoLoadLoraExact"
    info = LoadLoraExact.GET_NODE_INFO_V1()
    assert info["output_name"] == ["MODEL", "CLIP", "LORA_STACK", "report"]
    assert {"None", "a.safetensors", "b.safetensors"} <= set(info["input"]["required"]["lora_name"][1]["options"])
    stack = [("a.safetensors", 0.5, 0.25), ("None", 1.0, 1.0)]
    done = LoadLoraExact.execute(loaded.model, "b.safetensors", 1.0, 1.0, clip=loaded.clip, lora_stack=stack)
    model, clip, whole, report = done.args
    assert whole == [("a.safetensors", 0.5, 0.25), ("b.safetensors", 1.0, 1.0)]
    assert TO_Q in model.patches
    assert clip is not loaded.clip
    assert [line[:17] for line in report.splitlines() if line.startswith("'")] == [
        "'a.safetensors' a",
        "'b.safetensors' a",
    ]
    assert "Its strength for the text encoders is 0.25." in report
    none = LoadLoraExact.execute(loaded.model, "None", 1.0, 1.0)
    assert none.args[1:] == (None, [], "No LoRA.")
    before = LoadLoraExact.fingerprint_inputs("a.safetensors", strength_model=1.0)
    assert json.loads(json.dumps(before)) == before  # ComfyUI writes it into its cache's key
    assert before == LoadLoraExact.fingerprint_inputs("a.safetensors")
    os.utime(loras / "a.safetensors", ns=(1, 1))
    assert LoadLoraExact.fingerprint_inputs("a.safetensors") != before
    assert LoadLoraExact.fingerprint_inputs("gone.safetensors") is None
    assert "gone.safetensors" in LoadLoraExact.validate_inputs(lora_name="gone.safetensors")
    assert LoadLoraExact.validate_inputs(lora_name="a.safetensors") is True
    with pytest.raises(InvalidInput, match="lora_stack"):
        LoadLoraExact.execute(loaded.model, "None", 1.0, 1.0, lora_stack="a.safetensors")
