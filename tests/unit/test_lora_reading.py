"""Reading LoRA files: what fits is applied, what does not is told, what is broken or foreign is refused by its name."""

import hashlib
import json
import time

import pytest
import torch
from safetensors.torch import save_file

from impasto.errors import LoraError
from impasto.lora.contents import LoraContents, Mismatch
from impasto.lora.formats import read_lora
from impasto.lora.keys import Target, TargetNames
from impasto.lora.report import LoraReport

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
KEY, QUERY, CONV, NORM = f"{ATTENTION}.to_k", f"{ATTENTION}.to_q", "conv_in", "conv_norm_out"
SHAPES = {
    Target("unet", KEY): (8, 6), Target("unet", QUERY): (8, 8), Target("unet", CONV): (8, 4, 3, 3),
    Target("unet", CONV, "bias"): (8,), Target("unet", NORM): (8,), Target("unet", NORM, "bias"): (8,),
    Target("text_encoder", "encoder.layers.0.mlp.fc1"): (12, 6),
    Target("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"): (20, 10),
}  # fmt: skip
MODEL = TargetNames(SHAPES)
FLAT_KEY = "lora_unet_" + KEY.replace(".", "_")


def low_rank(out=8, inputs=6, rank=2, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "lora_down.weight": torch.randn(rank, inputs, generator=generator),
        "lora_up.weight": torch.randn(out, rank, generator=generator),
    }


def named(module: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{module}.{part}": tensor.contiguous() for part, tensor in tensors.items()}


def read(folder, tensors, metadata=None, model=MODEL, name="a.safetensors") -> LoraContents:
    save_file(tensors, folder / name, metadata)
    return read_lora(folder / name, model, "loras.2.path")


def refused(folder, tensors, phrase, metadata=None) -> None:
    with pytest.raises(LoraError, match=phrase) as caught:
        read(folder, tensors, metadata)
    assert caught.value.field == "loras.2.path"


def change(contents: LoraContents, module: str = KEY, network: str = "unet") -> torch.Tensor:
    """What a file adds to a weight of zeros."""
    target = Target(network, module)
    return contents.patches[target].patched(torch.zeros(SHAPES[target]), 1.0)


def test_what_fits_is_read_and_the_rest_is_told(tmp_path):
    """One module fits; an unknown one, one of another width, an embedding and notes each stand in their list."""
    tensors = named(FLAT_KEY, low_rank()) | named("lora_unet_elsewhere", low_rank())
    tensors |= named("unet." + QUERY, low_rank(8, 9)) | {"lora_unet_alone.alpha": torch.tensor(1.0)}
    tensors |= {"bundle_emb.ink.clip_l": torch.ones(1, 6), "unet.strange.thing": torch.ones(3, 3)}
    contents = read(
        tmp_path, tensors, {"ss_output_name": "ink", "modelspec.architecture": "stable-diffusion-xl-v1-base"}
    )
    assert set(contents.patches) == {Target("unet", KEY)}
    assert set(contents.unmatched) == {"lora_unet_elsewhere", "unet.strange.thing"}
    assert contents.mismatched == (Mismatch("unet." + QUERY, (8, 9), (8, 8)),)
    assert set(contents.ignored) == {"lora_unet_alone.alpha", "bundle_emb.ink.clip_l"}
    assert contents.base_model == "SDXL"
    assert contents.metadata["ss_output_name"] == "ink"
    assert contents.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


def test_of_a_module_named_twice_the_diffusers_name_counts(tmp_path):
    """The same module under its original and its diffusers name is applied once, and the other is told."""
    original = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    blocks = [f"down_blocks.{i}.resnets.{j}.conv1" for i in (0, 1) for j in (0, 1)]
    blocks.append("down_blocks.0.downsamplers.0.conv")
    model = TargetNames(SHAPES | {Target("unet", block): (8, 8) for block in blocks})
    one, two = low_rank(seed=1), low_rank(seed=2)
    for first, second in ((original, FLAT_KEY), (FLAT_KEY, "unet." + KEY), (original, "unet." + KEY)):
        contents = read(tmp_path, named(first, one) | named(second, two), model=model)
        torch.testing.assert_close(change(contents), two["lora_up.weight"] @ two["lora_down.weight"])
        assert contents.ignored == (first,)


REFINED = TargetNames(SHAPES | {Target("refiner", KEY): (8, 6), Target("refiner", QUERY): (9, 9)})


def test_of_a_module_named_twice_each_network_gets_its_best_spelling(tmp_path):
    """Names that mean other networks may meet on one: there the better spelling counts, elsewhere the other stays."""
    flat, dotted = low_rank(seed=1), low_rank(seed=2)
    flat_refiner = f"lora_refiner_{KEY.replace('.', '_')}"
    for first, second, in_unet, ignored in (
        (FLAT_KEY, f"refiner.{KEY}", flat, ()),  # both networks' and the refiner's
        (flat_refiner, f"unet.{KEY}", dotted, (flat_refiner,)),  # the refiner's and both networks'
    ):
        contents = read(tmp_path, named(first, flat) | named(second, dotted), model=REFINED)
        for network, tensors in (("unet", in_unet), ("refiner", dotted)):
            found = contents.patches[Target(network, KEY)].patched(torch.zeros(8, 6), 1.0)
            torch.testing.assert_close(found, tensors["lora_up.weight"] @ tensors["lora_down.weight"])
        assert contents.ignored == ignored
        assert not contents.unmatched


def test_a_better_spelling_that_does_not_fit_pushes_nothing_out(tmp_path):
    """The dotted name is of another width: the flat one, which fits, is applied, and the mismatch told."""
    tensors = named(FLAT_KEY, low_rank()) | named(f"unet.{KEY}", low_rank(8, 9))
    contents = read(tmp_path, tensors)
    assert set(contents.patches) == {Target("unet", KEY)}
    assert contents.mismatched == (Mismatch(f"unet.{KEY}", (8, 9), (8, 6)),)
    assert contents.ignored == ()


def test_a_bias_under_another_name_does_not_push_the_weight_out(tmp_path):
    """A LoRA under the flat name and a bias difference under the dotted one are two parameters: both count."""
    conv = {"lora_down.weight": torch.ones(1, 4, 3, 3), "lora_up.weight": torch.ones(8, 1, 1, 1)}
    contents = read(tmp_path, named("lora_unet_conv_in", conv) | {"unet.conv_in.diff_b": torch.ones(8)})
    assert set(contents.patches) == {Target("unet", CONV), Target("unet", CONV, "bias")}


def test_one_encoder_trainers_mean_the_encoder_that_fits(tmp_path):
    """``lora_te_`` may be either encoder: the widths decide."""
    for out, inputs, target in (
        (12, 6, ("text_encoder", "encoder")),
        (20, 10, ("text_encoder_2", "text_model.encoder")),
    ):
        name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        contents = read(tmp_path, named(name, low_rank(out, inputs)))
        assert set(contents.patches) == {Target(target[0], f"{target[1]}.layers.0.mlp.fc1")}
        assert not contents.mismatched


def test_base_and_refiner_are_both_patched_where_name_and_width_match(tmp_path):
    """A name that both have goes to each that it fits; the one that it does not fit is no mismatch."""
    both = TargetNames(
        {Target("unet", KEY): (8, 6), Target("refiner", KEY): (8, 6), Target("refiner", CONV): (8, 4, 3, 3)}
    )
    assert set(read(tmp_path, named(FLAT_KEY, low_rank()), model=both).patches) == {
        Target("unet", KEY), Target("refiner", KEY),
    }  # fmt: skip
    other = TargetNames({Target("unet", KEY): (8, 6), Target("refiner", KEY): (9, 6)})
    contents = read(tmp_path, named(FLAT_KEY, low_rank()), model=other)
    assert set(contents.patches) == {Target("unet", KEY)}
    assert not contents.mismatched


def test_biases_alone_do_not_make_a_file_the_refiners(tmp_path):
    """The last convolution has four outputs in base and refiner: its bias follows where the weights fit."""
    model = TargetNames(
        {Target("unet", KEY): (8, 6), Target("unet", "conv_out", "bias"): (4,),
         Target("refiner", KEY): (9, 6), Target("refiner", "conv_out", "bias"): (4,)}
    )  # fmt: skip
    contents = read(tmp_path, named(FLAT_KEY, low_rank()) | {"lora_unet_conv_out.diff_b": torch.ones(4)}, model=model)
    assert {target.network for target in contents.patches} == {"unet"}


PEFT = {"unet.r": 2, "unet.lora_alpha": 6}


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (PEFT, 3.0),
        ({"unet.r": 2}, 1.0),
        (PEFT | {"unet.use_rslora": True}, 6 / 2**0.5),
        (PEFT | {"unet.alpha_pattern": {"attn2.to_k": 8}}, 4.0),
        (PEFT | {"unet.alpha_pattern": {"tn2.to_k": 8}}, 3.0),  # a part of a name is no end of it
        (PEFT | {"unet.alpha_pattern": {r".*\.attn2\.to_[kv]": 10}}, 5.0),
        (PEFT | {"unet.alpha_pattern": {"to_q|to_k": 1}}, 0.5),
        ({"text_encoder.lora_alpha": 6}, 1.0),
        ({"lora_alpha": 6, "r": 2}, 3.0),
        (PEFT | {"unet.lora_alpha": 0}, 0.0),
    ],
)
def test_pefts_configuration_in_the_metadata_scales(tmp_path, config, factor):
    """alpha over rank or its root, by pattern where there is one, of the network that it is for."""
    halves = low_rank()
    tensors = {
        f"unet.{KEY}.lora_A.weight": halves["lora_down.weight"],
        f"unet.{KEY}.lora_B.weight": halves["lora_up.weight"],
    }
    contents = read(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    torch.testing.assert_close(change(contents), factor * halves["lora_up.weight"] @ halves["lora_down.weight"])


def test_the_first_pattern_counts_plain_or_not(tmp_path):
    """As PEFT takes them: in the file's order, ends of names and expressions alike."""
    for patterns, alpha in (
        ({"attn2.to_k": 8, ".*to_k": 4}, 8),
        ({".*to_k": 4, "attn2.to_k": 8}, 4),
        ({"to_q": 1, "to_k": 6, KEY: 2}, 6),
        ({KEY: 2, "to_k": 6}, 2),
        ({"to_v": 1}, PEFT["unet.lora_alpha"]),
    ):
        config = {"lora_adapter_metadata": json.dumps(PEFT | {"unet.alpha_pattern": patterns})}
        contents = read(tmp_path, named("unet." + KEY, low_rank()), config)
        assert contents.patches[Target("unet", KEY)].scale == alpha / 2


def test_patterns_for_every_module_cost_little(tmp_path):
    """diffusers may write one for each module, and every module is looked up among them."""
    shapes = {
        Target("unet", f"down_blocks.1.attentions.0.transformer_blocks.{i}.attn1.to_q"): (4, 4) for i in range(700)
    }
    tensors = {k: t for target in shapes for k, t in named(f"unet.{target.module}", low_rank(4, 4)).items()}
    patterns = {target.module: i for i, target in enumerate(shapes)} | {f"elsewhere.{i}": 1 for i in range(1200)}
    config = PEFT | {"unet.alpha_pattern": patterns, "unet.rank_pattern": dict.fromkeys(patterns, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    start = time.perf_counter()
    contents = read_lora(tmp_path / "a.safetensors", TargetNames(shapes))
    assert time.perf_counter() - start < 2
    assert [contents.patches[target].scale for target in shapes] == [i / 2 for i in range(700)]


def test_a_rank_pattern_that_is_not_needed_is_not_followed(tmp_path):
    """The rank of a LoRA is its matrices': an involved pattern for it refuses nothing."""
    config = {"lora_adapter_metadata": json.dumps(PEFT | {"unet.rank_pattern": {"(a+)+$": 1}})}
    assert change(read(tmp_path, named("unet." + KEY, low_rank()), config)).any()


def test_rotations_that_were_saved_themselves_are_taken_as_they_are(tmp_path):
    """The first LyCORIS saved diag-OFT's rotations as ``oft_diag``: W' = R^T W, and no alpha."""
    rotation = torch.linalg.qr(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)))[0]
    tensors = {"oft_diag": rotation, "rescale": torch.full((8, 1), 2.0), "alpha": torch.tensor(4.0)}
    patch = read(tmp_path, named(FLAT_KEY, tensors)).patches[Target("unet", KEY)]
    weight = torch.randn(8, 6)
    torch.testing.assert_close(patch.patched(weight, 1.0), 2 * torch.block_diag(*rotation).T @ weight)


def test_vera_s_matrices_are_those_of_its_own_words(tmp_path):
    """Two networks may each have a pair; a module's is the one under the same words, cut to its size."""
    tensors = {}
    for prefix, size in (("unet.base_model.", 1.0), ("text_encoder.base_model.", 2.0)):
        tensors |= {f"{prefix}vera_A": torch.full((2, 20), size), f"{prefix}vera_B": torch.full((20, 2), size)}
    for module, out in (
        (f"unet.base_model.model.{KEY}", 8),
        ("text_encoder.base_model.model.encoder.layers.0.mlp.fc1", 12),
    ):
        tensors |= {f"{module}.vera_lambda_b": torch.full((out,), 3.0), f"{module}.vera_lambda_d": torch.ones(2)}
    contents = read(tmp_path, tensors)
    torch.testing.assert_close(change(contents), torch.full((8, 6), 2 * 3.0))
    text = change(contents, "encoder.layers.0.mlp.fc1", "text_encoder")
    torch.testing.assert_close(text, torch.full((12, 6), 2 * 3.0 * 4))
    assert {patch.kind for patch in contents.patches.values()} == {"VeRA"}
    assert not contents.unmatched
    assert not contents.ignored


def test_modules_that_share_matrices_share_their_memory(tmp_path):
    """A small file of many VeRA modules stays small: their halves are views of one pair."""
    tensors = {"base_model.vera_A": torch.ones(2, 20), "base_model.vera_B": torch.ones(20, 2)}
    for module, out in ((KEY, 8), (QUERY, 8)):
        tensors |= {f"base_model.model.{module}.vera_lambda_b": torch.ones(out)}
        tensors |= {f"base_model.model.{module}.vera_lambda_d": torch.ones(2)}
    one, two = read(tmp_path, tensors).patches.values()
    assert one.down.data_ptr() == two.down.data_ptr()
    assert one.up.data_ptr() == two.up.data_ptr()


def test_whole_weights_that_peft_saved_beside_its_adapters_replace_the_model_s(tmp_path):
    """``modules_to_save`` and trained biases: the trainer's own values, its copies of the model's passed over."""
    halves = {"lora_A.weight": torch.ones(2, 6), "lora_B.weight": torch.ones(8, 2)}
    conv, bias = torch.full((8, 4, 3, 3), 5.0), torch.full((8,), 7.0)
    tensors = named(f"base_model.model.{KEY}", halves)
    tensors |= {"base_model.model.conv_in.weight": conv, "base_model.model.conv_in.base_layer.bias": bias}
    tensors |= {"base_model.model.conv_in.modules_to_save.bias": bias.clone()}
    tensors |= {"base_model.model.conv_in.original_module.bias": torch.zeros(8)}
    contents = read(tmp_path, tensors)
    for target, wanted in ((Target("unet", CONV), conv), (Target("unet", CONV, "bias"), bias)):
        assert torch.equal(contents.patches[target].patched(torch.zeros_like(wanted), 1.0), wanted)
        assert torch.equal(contents.patches[target].patched(torch.ones_like(wanted), 0.0), torch.ones_like(wanted))
    assert len(contents.ignored) == 2
    assert not contents.unmatched


def test_whole_weights_without_adapters_are_no_lora(tmp_path):
    """A UNet that PEFT's words stand before is a UNet."""
    refused(tmp_path, {f"base_model.model.{KEY}.weight": torch.ones(8, 6)}, "holds no LoRA|a whole UNet")


def test_bundled_embeddings_of_every_tool_are_told_as_such(tmp_path):
    """They stand among what was ignored, by their words in a warning, and never as unknown modules."""
    bundles = {"bundle_emb.inkwash.clip_l": torch.ones(1, 6), "bundle_emb.a.b.string_to_param.*": torch.ones(1, 6),
               "clip_g": torch.ones(1, 9), "<fox>": torch.ones(6), "emb_params": torch.ones(1, 6)}  # fmt: skip
    contents = read(tmp_path, named(FLAT_KEY, low_rank()) | bundles)
    assert set(contents.ignored) == set(bundles)
    assert not contents.unmatched
    said, wordless = LoraReport.of(contents, "a").warnings
    assert "for '<fox>', 'a.b', 'inkwash' that it brings was not applied: it is not for SDXL" in said
    assert "was not applied: it stands there without its word" in wordless


PEFT_HALVES = {"lora_A.weight": torch.ones(2, 6), "lora_B.weight": torch.ones(8, 2)}
ALPHA_KNOWN = {
    "nowhere": (PEFT_HALVES, None, False),
    "a tensor": (PEFT_HALVES | {"alpha": torch.tensor(1.0)}, None, True),
    "the metadata": (PEFT_HALVES, {"unet.lora_alpha": 4}, True),
    "a pattern": (PEFT_HALVES, {"unet.alpha_pattern": {"to_k": 4}}, True),
    "another module's pattern": (PEFT_HALVES, {"unet.alpha_pattern": {"to_q": 4}}, False),
    "another network's": (PEFT_HALVES, {"text_encoder.lora_alpha": 4}, False),
    "not PEFT's": (low_rank(), None, True),  # kohya's format has it in the file, or means the rank
}


@pytest.mark.parametrize("where", ALPHA_KNOWN)
def test_a_peft_file_without_its_alpha_is_applied_with_a_warning(tmp_path, where):
    """The guess is the rank, and the report says that it is one; where alpha is told, nothing is said."""
    tensors, config, known = ALPHA_KNOWN[where]
    metadata = config and {"lora_adapter_metadata": json.dumps(config)}
    contents = read(tmp_path, named("unet." + KEY, tensors), metadata)
    said = " ".join(LoraReport.of(contents, "a").warnings)
    assert contents.unscaled == (0 if known else 1)
    assert ("alpha was taken to be the rank" in said) is not known
    if not known:
        assert contents.patches[Target("unet", KEY)].scale == 1


def test_pefts_configuration_beside_the_file_tells_its_alpha(tmp_path):
    """As PEFT saves its folder."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    contents = read(tmp_path, named("base_model.model." + KEY, PEFT_HALVES), name="adapter_model.safetensors")
    assert contents.unscaled == 0
    assert contents.patches[Target("unet", KEY)].scale == 2


def test_an_alpha_tensor_goes_before_the_configuration(tmp_path):
    """The file's own number for a module is nearer the truth than a general one."""
    tensors = named("unet." + KEY, low_rank() | {"alpha": torch.tensor(1.0)})
    contents = read(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(PEFT)})
    assert contents.patches[Target("unet", KEY)].scale == 0.5


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", ".*.*.*x", "a{1,99}{1,99}", "(", "a" * 300 + "+", ".?" * 40, "(.|.)" * 9]
)
def test_patterns_that_could_run_for_ever_are_refused_at_once(tmp_path, pattern):
    """A regular expression from a stranger's file is taken only where it is harmless."""
    start = time.perf_counter()
    config = {"lora_adapter_metadata": json.dumps(PEFT | {"unet.alpha_pattern": {pattern: 1}})}
    refused(tmp_path, named("unet." + KEY, low_rank()), "pattern", config)
    assert time.perf_counter() - start < 1


def test_a_configuration_that_is_none_is_refused(tmp_path):
    """Its strength would be a guess."""
    for text in ("[", "[1]", "7", "[" * 50_000):
        refused(tmp_path, named("unet." + KEY, low_rank()), "configuration", {"lora_adapter_metadata": text})


def broken() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Name -> (one module's tensors, a phrase of the error)."""
    half, nan, inf = low_rank(), float("nan"), float("inf")
    loha = {f"hada_{p}": torch.ones(8, 2) for p in ("w1_a", "w2_a")} | {
        f"hada_{p}": torch.ones(2, 6) for p in ("w1_b", "w2_b")
    }
    return {
        "up without down": ({"lora_up.weight": half["lora_up.weight"]}, "incomplete"),
        "down without up": ({"lora_down.weight": half["lora_down.weight"], "alpha": torch.tensor(1.0)}, "incomplete"),
        "a magnitude alone": ({"dora_scale": torch.ones(8, 1)}, "incomplete"),
        "mid alone": ({"lora_mid.weight": torch.ones(2, 2, 3, 3)}, "incomplete"),
        "ranks that disagree": (half | {"lora_up.weight": torch.ones(8, 3)}, "ranks"),
        "LoHa of three matrices": ({k: v for k, v in loha.items() if k != "hada_w2_b"}, "incomplete"),
        "LoHa whose ranks disagree": (loha | {"hada_w1_b": torch.ones(3, 6)}, "ranks disagree"),
        "LoHa with one core": (loha | {"hada_t1": torch.ones(2, 2, 3, 3)}, "incomplete"),
        "LoKr of one factor": ({"lokr_w1": torch.ones(2, 2)}, "incomplete"),
        "LoKr whose ranks disagree": (
            {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(1, 3)},
            "ranks disagree",
        ),
        "GLoRA of three": ({f"{p}.weight": torch.ones(2, 2) for p in ("a1", "a2", "b1")}, "incomplete"),
        "blocks that are not square": ({"oft_blocks": torch.ones(2, 4, 3)}, "square blocks"),
        "rescale alone": ({"rescale": torch.ones(8)}, "incomplete"),
        "no triangle": ({"oft_R.weight": torch.ones(2, 4)}, "triangles"),
        "two kinds at once": (half | loha, "incomplete"),
        "a magnitude on a rotation": (
            {"oft_blocks": torch.ones(2, 4, 4), "dora_scale": torch.ones(8, 1)}, "no trainer makes",
        ),
        "not a number": (half | {"lora_up.weight": torch.full((8, 2), nan)}, "not finite"),
        "infinite": (half | {"lora_down.weight": torch.full((2, 6), inf)}, "not finite"),
        "infinite alpha": (half | {"alpha": torch.tensor(inf)}, "alpha is not finite"),
        "alpha of two numbers": (half | {"alpha": torch.ones(2)}, "not one number"),
        "a product beyond all numbers": (
            {"lora_up.weight": torch.full((8, 2), 1e30), "lora_down.weight": torch.full((2, 6), 1e30)}, "product",
        ),
        "whole numbers": (half | {"lora_up.weight": torch.ones(8, 2, dtype=torch.int32)}, "int32"),
        "a vector": ({"lora_up.weight": torch.ones(8), "lora_down.weight": torch.ones(2, 6)}, "no half|matrix"),
        "a magnitude of another length": (half | {"dora_scale": torch.ones(7, 1)}, "7 numbers for a weight of"),
        "a rescale of another length": (
            {"oft_blocks": torch.ones(2, 4, 4), "rescale": torch.ones(7)}, "7 numbers for 8",
        ),
        "PEFT's rescale alone": ({"boft_s": torch.ones(8, 1)}, "incomplete"),
        "rotations that are not square": ({"oft_diag": torch.ones(2, 4, 3)}, "square blocks"),
        "VeRA without its matrices": (
            {"vera_lambda_b": torch.ones(8), "vera_lambda_d": torch.ones(2)}, "save_projection",
        ),
        "values of another rank": (
            {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(8, 2), "lora_E": torch.ones(3, 1)}, "ranks disagree",
        ),
        "a part of a kind that has no such part": (half | {"lokr_t1": torch.ones(2, 2, 1, 1)}, "incomplete"),
        "two spellings of one half": (half | {"lora_A.weight": torch.ones(2, 6)}, "two spellings|broken"),
    }  # fmt: skip


@pytest.mark.parametrize("name", broken())
def test_a_broken_module_is_refused_with_its_name(tmp_path, name):
    """Nothing that a trainer could not have meant is applied, and the error names the module and the remedy."""
    tensors, phrase = broken()[name]
    refused(tmp_path, named(FLAT_KEY, tensors), phrase)


WIDE = 200_000
BOMBS = {
    "LoKr": {"lokr_w1": torch.ones(1, 1), "lokr_w2_a": torch.ones(WIDE, 1), "lokr_w2_b": torch.ones(1, WIDE)},
    "LoKr, first": {"lokr_w2": torch.ones(1, 1), "lokr_w1_a": torch.ones(WIDE, 1), "lokr_w1_b": torch.ones(1, WIDE)},
    "LoKr, Tucker": {
        "lokr_w1": torch.ones(1, 1), "lokr_w2_a": torch.ones(1, WIDE), "lokr_w2_b": torch.ones(1, WIDE),
        "lokr_t2": torch.ones(1, 1, 3, 3),
    },
    "LoRA": {"lora_up.weight": torch.ones(WIDE, 1), "lora_down.weight": torch.ones(1, WIDE)},
    "LoCon, Tucker": {
        "lora_up.weight": torch.ones(8, 1), "lora_down.weight": torch.ones(1, WIDE),
        "lora_mid.weight": torch.ones(1, 1, 300, 300),
    },
    "LoHa": {
        "hada_w1_a": torch.ones(WIDE, 1), "hada_w1_b": torch.ones(1, WIDE),
        "hada_w2_a": torch.ones(WIDE, 1), "hada_w2_b": torch.ones(1, WIDE),
    },
    "GLoRA": {
        "a1.weight": torch.ones(WIDE, 1), "a2.weight": torch.ones(1, WIDE), "b1.weight": torch.ones(WIDE, 1),
        "b2.weight": torch.ones(1, WIDE), "bm.weight": torch.ones(1, 1, 99, 99),
    },
    "diag-OFT": {"oft_blocks": torch.ones(1, 3000, 3000)},
    "OFTv2": {"oft_R.weight": torch.ones(1, 3000 * 2999 // 2)},
    "BOFT, PEFT's": {"boft_R": torch.ones(1, 1, 3000, 3000), "boft_s": torch.ones(8, 1)},
    "rotations": {"oft_diag": torch.ones(1, 3000, 3000)},
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_small_factors_of_a_vast_product_are_never_multiplied(tmp_path, kind):
    """A file of a megabyte could stand for 160 GB: its size is compared with the model's first."""
    start = time.perf_counter()
    contents = read(tmp_path, named(FLAT_KEY, BOMBS[kind]) | named("unet." + QUERY, low_rank(8, 8)))
    assert [mismatch.module for mismatch in contents.mismatched] == [FLAT_KEY]
    assert set(contents.patches) == {Target("unet", QUERY)}
    assert time.perf_counter() - start < 2


def test_large_numbers_whose_product_is_finite_are_taken(tmp_path):
    """The refusal of overflow is no refusal of size."""
    big, small = torch.full((8, 2), 1e20), torch.full((2, 6), 1e-20)
    contents = read(tmp_path, named(FLAT_KEY, {"lora_up.weight": big, "lora_down.weight": small}))
    torch.testing.assert_close(change(contents), torch.full((8, 6), 2.0))


def flat(*names: str, inputs=768) -> dict[str, torch.Tensor]:
    return {key: t for name in names for key, t in named(name, low_rank(320, inputs)).items()}


FOREIGN = {
    "SD 1.5": flat("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"),
    "SD 2": flat("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", inputs=1024),
    "SDXL of another size": flat(FLAT_KEY, inputs=2048),
    "SDXL refiner": flat(FLAT_KEY, inputs=1280),
    "Flux": flat("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"),
    "Flux,": flat("transformer.single_transformer_blocks.0.attn.to_q"),
    "SD 3": flat("transformer.transformer_blocks.0.attn.add_k_proj"),
    "Wan": flat("diffusion_model.blocks.0.cross_attn.k"),
    "AnimateDiff": flat("down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attn1.to_q"),
    "a ControlNet": {"control_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)},
    "a ControlNet,": {"lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight": torch.ones(4, 4)},
    "a textual inversion": {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
    "a textual inversion,": {"emb_params": torch.ones(1, 768)},
    "a whole checkpoint": {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3),
        "first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
    },
    "a whole UNet": {f"{KEY}.weight": torch.ones(8, 6)},
    "no LoRA that is known": {"something.else": torch.ones(2, 2)},
    "no LoRA that is known,": {f"lora_unet_{i}.alpha": torch.tensor(1.0) for i in range(3)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_does_nothing_is_refused_as_what_it_is(tmp_path, what):
    """Zero matches are an error, never a success, and the sentence says whose file it is."""
    refused(tmp_path, FOREIGN[what], what.rstrip(","))


def test_most_of_a_file_for_another_base_is_refused_though_some_fits(tmp_path):
    """SD 1.5's text encoder is SDXL's first one: that part would fit, and the file would do half of nothing."""
    tensors = named("lora_te_text_model_encoder_layers_0_mlp_fc1", low_rank(12, 6))
    tensors |= flat(*(f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn2_to_k" for i in range(3)))
    refused(tmp_path, tensors, r"is for SD 1\.5, and 3 of its 4 modules")


def test_names_that_fit_by_chance_are_told_by_the_metadata(tmp_path):
    """A quarter of another base's modules may have a name and a width of ours."""
    tensors = named(FLAT_KEY, low_rank())
    tensors |= {k: t for i in range(3) for k, t in named(f"lora_unet_other_{i}", low_rank()).items()}
    refused(tmp_path, tensors, r"SD 1\.5", {"ss_base_model_version": "sd_v1"})
    assert read(tmp_path, tensors, {"ss_base_model_version": "sdxl_base_v1-0"}).base_model == "SDXL"
    assert len(read(tmp_path, tensors).unmatched) == 3


def test_metadata_alone_condemn_nothing(tmp_path):
    """What fits is for this model, whatever its trainer wrote down: metadata are often wrong."""
    contents = read(tmp_path, named(FLAT_KEY, low_rank()), {"ss_base_model_version": "sd_v1"})
    assert set(contents.patches) == {Target("unet", KEY)}
    assert contents.base_model == "SDXL"


def test_a_stray_module_does_not_silence_the_rest(tmp_path):
    """One foreign pair in a good file, as sliders have: the rest is applied and the pair told."""
    tensors = named(FLAT_KEY, low_rank()) | named("diffusion_model_foreign", low_rank())
    contents = read(tmp_path, tensors)
    assert len(contents.patches) == 1
    assert contents.unmatched == ("diffusion_model_foreign",)


def test_trigger_words_are_the_phrase_and_the_frequent_tags(tmp_path):
    """The author's phrase first, then tags by number over all folders; nonsense is passed over."""
    tags = {"10_a": {"ink": 5, "wash": 2}, "1_b": {"wash": 9, "bad": "x", "worse": -1, "": 3}, "c": [1]}
    metadata = {"ss_tag_frequency": json.dumps(tags), "modelspec.trigger_phrase": "inkwash\nstyle"}
    tensors = named(FLAT_KEY, low_rank())
    assert read(tmp_path, tensors, metadata).trigger_words == ("inkwashstyle", "wash", "ink")
    for text in ("{", "[" * 50_000, "7", json.dumps({"a": {str(i): i for i in range(500)}})):
        assert len(read(tmp_path, tensors, {"ss_tag_frequency": text}).trigger_words) <= 20


def test_tensors_are_the_files_own_copy(tmp_path):
    """A file that is written over while its patches are in memory does not change them."""
    contents = read(tmp_path, named(FLAT_KEY, low_rank()))
    before = change(contents)
    path = tmp_path / "a.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 64)
        file.write(b"\x7f" * 64)
    assert torch.equal(change(contents), before)


def test_a_bias_goes_with_its_weight_to_base_or_refiner(tmp_path):
    """Layers of base and refiner that have a name and as many outputs in common: a whole one is for where it fits."""
    model = TargetNames(
        SHAPES | {Target("refiner", CONV): (8, 5, 3, 3), Target("refiner", CONV, "bias"): (8,)}
        | {Target("refiner", KEY): (9, 6)}
    )  # fmt: skip
    whole = {"diff": torch.ones(8, 4, 3, 3), "diff_b": torch.ones(8)}
    tensors = named("unet." + CONV, whole) | named("unet." + KEY, low_rank(9))
    contents = read(tmp_path, tensors, model=model)
    assert set(contents.patches) == {Target("unet", CONV), Target("unet", CONV, "bias"), Target("refiner", KEY)}
    assert (contents.unmatched, contents.mismatched, contents.ignored) == ((), (), ())


def test_a_layer_that_fits_base_and_refiner_goes_with_the_rest_of_the_file(tmp_path):
    """Rotations of the outputs know no inputs, so one may fit both: the other modules tell whose the file is."""
    model = TargetNames(
        SHAPES
        | {Target("refiner", CONV): (8, 5, 3, 3), Target("refiner", KEY): (9, 6), Target("refiner", QUERY): (9, 9)}
    )
    turned = named("unet." + CONV, {"oft_blocks": torch.randn(2, 4, 4)})
    base = named("unet." + KEY, low_rank()) | named("unet." + QUERY, low_rank(8, 8))
    refiner = named("unet." + KEY, low_rank(9)) | named("unet." + QUERY, low_rank(9, 9))
    for others, network in ((base, "unet"), (refiner, "refiner")):
        contents = read(tmp_path, turned | others, model=model)
        assert set(contents.patches) == {Target(network, module) for module in (CONV, KEY, QUERY)}
        assert (contents.unmatched, contents.mismatched, contents.ignored) == ((), (), ())


@pytest.mark.parametrize(
    ("part", "shape"), [("oft_blocks", (2000, 1, 8, 8)), ("boft_R", (2000, 1, 8, 8)), ("oft_R.weight", (40_000, 1))]
)
def test_rotations_are_counted_before_they_are_worked_out(tmp_path, monkeypatch, part, shape):
    """More stages or blocks than a weight can have cost no float64: a file of bytes would grow some fifty times."""
    for name in ("cayley", "half_cayley", "cayley_of_upper"):
        monkeypatch.setattr(f"impasto.lora.kinds.{name}", lambda *_: pytest.fail("was worked out"))
    tensors = named("lora_unet_" + QUERY.replace(".", "_"), {part: torch.zeros(shape).to(torch.float8_e4m3fn)})
    refused(tmp_path, tensors, "stages where 8 need|is not for this model")
