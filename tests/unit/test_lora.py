"""LoRA names: every spelling finds its module, in the base, the refiner and both text encoders; nothing is guessed."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from impasto.lora.keys import Spelling, Target, TargetNames

SDXL_NAMES = {
    # original SDXL (kohya) name -> diffusers name, one of each part of the block layout
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_k": "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k",
    "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": (
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
    ),
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_0_attn1_to_out_0": "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_0_1_transformer_blocks_0_attn1_to_q": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
    "out_2": "conv_out",
    "out_0": "conv_norm_out",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
REFINER_NAMES = {
    "input_blocks_4_1_transformer_blocks_3_attn2_to_k": "down_blocks.1.attentions.0.transformer_blocks.3.attn2.to_k",
    "input_blocks_9_0_op": "down_blocks.2.downsamplers.0.conv",
    "input_blocks_11_0_in_layers_2": "down_blocks.3.resnets.1.conv1",
    "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_1_proj_in": "up_blocks.1.attentions.0.proj_in",
    "output_blocks_8_2_conv": "up_blocks.2.upsamplers.0.conv",
    "output_blocks_11_0_out_layers_3": "up_blocks.3.resnets.2.conv2",
}
TEXT = {
    Target("text_encoder", "encoder.layers.0.self_attn.q_proj"): (768, 768),
    Target("text_encoder", "encoder.layers.0.self_attn.q_proj", "bias"): (768,),
    Target("text_encoder", "encoder.layers.0.mlp.fc1"): (3072, 768),
    Target("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"): (5120, 1280),
    Target("text_encoder_2", "text_projection"): (1280, 1280),
}


def unet(**layout) -> UNet2DConditionModel:
    """A UNet of SDXL's family without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            addition_embed_type="text_time", addition_time_embed_dim=256, use_linear_projection=True, **layout
        )


def shapes(network: str, root: nn.Module) -> dict[Target, torch.Size]:
    return {
        Target(network, name, parameter): value.shape
        for name, module in root.named_modules()
        for parameter in ("weight", "bias")
        if isinstance(value := getattr(module, parameter, None), torch.Tensor)
    }


@pytest.fixture(scope="module")
def names() -> TargetNames:
    """The modules of the real SDXL base and refiner, from their real configurations, and a few of the encoders."""
    base = unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        projection_class_embeddings_input_dim=2816,
    )
    refiner = unet(
        block_out_channels=(384, 768, 1536, 1536),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24),
        cross_attention_dim=1280,
        projection_class_embeddings_input_dim=2560,
    )
    return TargetNames(shapes("unet", base) | shapes("refiner", refiner) | TEXT)


@pytest.mark.parametrize(("original", "diffusers"), SDXL_NAMES.items())
def test_every_spelling_of_a_module_means_it(names, original, diffusers):
    """Original and diffusers names, flat and dotted, under every prefix in use, find the one module."""
    flat = diffusers.replace(".", "_")
    spelled = [f"{prefix}{name}" for prefix in ("lora_unet_", "oft_unet_", "lycoris_") for name in (original, flat)]
    spelled += [f"{p}{diffusers}" for p in ("unet.", "base_model.model.", "unet.base_model.model.", "", "module.unet.")]
    for name in spelled:
        assert Target("unet", diffusers) in names.match(name).targets, name


@pytest.mark.parametrize(("original", "diffusers"), REFINER_NAMES.items())
def test_the_refiners_blocks_have_their_own_places(names, original, diffusers):
    """Four levels deep: the layout is counted from the refiner's own modules."""
    assert Target("refiner", diffusers) in names.match(f"lora_unet_{original}").targets
    assert names.find(f"refiner.{diffusers}") == Target("refiner", diffusers)


def test_every_original_name_of_the_unet_is_covered(names):
    """All 722 attention linears that kohya trains by default are found under their original names."""
    found = set()
    blocks = [(f"input_blocks_{i}_1", n) for i, n in [(4, 2), (5, 2), (7, 10), (8, 10)]]
    blocks += [("middle_block_1", 10)] + [(f"output_blocks_{i}_1", 10 if i < 3 else 2) for i in range(6)]
    parts = [f"attn{a}_to_{p}" for a in (1, 2) for p in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    for block, depth in blocks:
        inside = ["proj_in", "proj_out"] + [f"transformer_blocks_{d}_{p}" for d in range(depth) for p in parts]
        found |= {names.find(f"lora_unet_{block}_{name}") for name in inside}
    assert None not in found
    assert len({target for target in found if target.network == "unet"}) == 722


def test_text_encoder_names_with_and_without_text_model(names):
    """transformers 5 dropped ``text_model`` on one encoder and not on the other: both spellings find both."""
    first = Target("text_encoder", "encoder.layers.0.mlp.fc1")
    second = Target("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")
    for middle in ("", "text_model."):
        layer = f"{middle}encoder.layers.0.mlp.fc1"
        flat = layer.replace(".", "_")
        assert names.find(f"lora_te1_{flat}") == first
        assert names.find(f"lora_te2_{flat}") == second
        assert names.find(f"text_encoder.{layer}") == first
        assert names.find(f"text_encoder_2.base_model.model.{layer}") == second
        assert names.find(f"text_encoders.clip_l.transformer.{layer}") == first
        assert names.find(f"text_encoders.clip_g.transformer.{layer}") == second
        assert names.match(f"lora_te_{flat}").targets == (first, second)
    assert names.find("lora_te2_text_projection") == Target("text_encoder_2", "text_projection")
    assert names.find("conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc") == second


def test_the_first_attention_processors_of_diffusers(names):
    """``processor``, ``to_out`` without its number, and the text encoder's attention under the UNet's words."""
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert names.find(f"unet.{block}.processor.to_out") == Target("unet", f"{block}.to_out.0")
    assert names.find(f"{block}.processor.to_q") == Target("unet", f"{block}.to_q")
    assert names.find("text_encoder.text_model.encoder.layers.0.self_attn.to_q") == Target(
        "text_encoder", "encoder.layers.0.self_attn.q_proj"
    )


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("unet.conv_in", Spelling.DOTTED),
        ("lora_unet_conv_in", Spelling.FLAT),
        ("lora_unet_input_blocks_0_0", Spelling.ORIGINAL),
        ("diffusion_model.input_blocks.0.0", Spelling.ORIGINAL),
    ],
)
def test_a_name_tells_its_spelling(names, name, spelling):
    """So that of one module named twice the better spelling can be taken."""
    assert names.match(name).spelling == spelling


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_nonsense", "double_blocks.0.img_attn.qkv", "unet.", "", "lora_", "transformer.conv_in",
        "vae.encoder.conv_in", "controlnet.conv_in", "lora_te3_encoder_layers_0_mlp_fc1", "lora_te1_conv_in",
        "text_encoder_2.conv_in", "lora_lora_lora_lora_lora_lora_lora_unet_conv_in",
    ],
)  # fmt: skip
def test_unknown_names_are_none(names, name):
    """Nothing is guessed, and no network's module is taken for another's."""
    assert names.match(name) is None
    assert names.find(name) is None


def test_shapes_are_told_for_weights_and_biases(names):
    """A parameter that the model has not is ``None``."""
    assert names.shape(Target("text_encoder", "encoder.layers.0.self_attn.q_proj", "bias")) == (768,)
    assert names.shape(Target("text_encoder_2", "text_projection", "bias")) is None
    assert set(names.networks) == {"unet", "refiner", "text_encoder", "text_encoder_2"}
