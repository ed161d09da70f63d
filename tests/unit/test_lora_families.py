"""Whose LoRA a file is: the image model's modules decide, since families share text encoders, names and widths."""

import pytest
import torch
from safetensors.torch import save_file

from impasto.errors import LoraError
from impasto.lora.bases import base_of
from impasto.lora.contents import LoraContents
from impasto.lora.formats import read_lora
from impasto.lora.keys import Target, TargetNames

ATTENTION = "down_blocks.1.attentions.{}.transformer_blocks.0.attn1.to_q"
LAYERS = 6
UNET = {Target("unet", ATTENTION.format(i)): (8, 8) for i in range(4)}
FIRST = {Target("text_encoder", f"encoder.layers.{i}.mlp.fc1"): (12, 6) for i in range(LAYERS)}
SECOND = {Target("text_encoder_2", f"text_model.encoder.layers.{i}.mlp.fc1"): (20, 10) for i in range(LAYERS)}
REFINER = {Target("refiner", ATTENTION.format(i)): (9, 9) for i in range(2)}
BASE = UNET | FIRST | SECOND
MODEL = TargetNames(BASE)
SD1, SD2 = {"ss_base_model_version": "sd_v1"}, {"ss_base_model_version": "sd_v2", "ss_v2": "True"}


def pair(module: str, out: int = 8, inputs: int = 8, *, peft: bool = False) -> dict[str, torch.Tensor]:
    """A low-rank pair as kohya or PEFT writes it."""
    down, up = ("lora_A", "lora_B") if peft else ("lora_down", "lora_up")
    return {f"{module}.{down}.weight": torch.ones(2, inputs), f"{module}.{up}.weight": torch.ones(out, 2)}


def pairs(*modules: str, out: int = 8, inputs: int = 8) -> dict[str, torch.Tensor]:
    return {key: tensor for module in modules for key, tensor in pair(module, out, inputs).items()}


def first(word="lora_te1_") -> dict[str, torch.Tensor]:
    return pairs(*(f"{word}text_model_encoder_layers_{i}_mlp_fc1" for i in range(LAYERS)), out=12, inputs=6)


def second() -> dict[str, torch.Tensor]:
    return pairs(*(f"lora_te2_text_model_encoder_layers_{i}_mlp_fc1" for i in range(LAYERS)), out=20, inputs=10)


def unet(*layers: int) -> dict[str, torch.Tensor]:
    return pairs(*(f"lora_unet_{ATTENTION.format(i).replace('.', '_')}" for i in layers))


def read(folder, tensors, metadata=None, model=MODEL) -> LoraContents:
    save_file(tensors, folder / "a.safetensors", metadata)
    return read_lora(folder / "a.safetensors", model, "loras.0.path")


def refusal(folder, tensors, metadata=None, model=MODEL) -> str:
    with pytest.raises(LoraError) as caught:
        read(folder, tensors, metadata, model)
    return caught.value.problem


SD1_UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize("metadata", [None, SD1])
def test_a_text_encoder_cannot_outvote_another_unet(tmp_path, metadata):
    """SD 1.5's text encoder is SDXL's first one: though most of the file fits, it is SD 1.5's and does half of it."""
    tensors = pair(SD1_UNET, 320, 768) | first("lora_te_")
    problem = refusal(tmp_path, tensors, metadata)
    assert problem.startswith(f"is for SD 1.5, and 1 of its {LAYERS + 1} modules (1 of the 1 beside the text encoders)")
    assert problem.endswith("choose a LoRA made for SDXL")
    sd2 = pair(SD1_UNET.replace("attn2_to_k", "attn1_to_q"), 320, 320) | first("lora_te_")
    assert "is for SD 2," in refusal(tmp_path, sd2, SD2)


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "SD 3"),
        ("transformer.transformer_blocks.0.attn.add_k_proj", "SD 3"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("lora_unet_layers_0_attention_qkv", "Lumina"),
    ],
)
def test_both_text_encoders_cannot_outvote_a_transformer(tmp_path, module, family):
    """CLIP-L and CLIP-G are SD 3's too, and CLIP-L is Flux': one module of theirs is enough."""
    assert refusal(tmp_path, pair(module, 96, 96) | first() | second()).startswith(f"is for {family}, and 1 of its 13")


def test_text_encoders_do_not_hide_that_nothing_else_fits(tmp_path):
    """A UNet's part of another width, or under names that are not known, is not passed over because the texts fit."""
    wide = pairs(*(f"lora_unet_{ATTENTION.format(i).replace('.', '_')}" for i in range(4)), out=16, inputs=16)
    assert "4 of the 4 beside the text encoders" in refusal(tmp_path, wide | second())
    unknown = pairs(*(f"lora_unet_nobody_knows_{i}" for i in range(4)))
    assert "is for another base model" in refusal(tmp_path, unknown | first())


def test_a_stray_beside_text_encoders_is_told_and_does_no_harm(tmp_path):
    """One module that nobody knows is a stray of a tool, not a UNet's part."""
    contents = read(tmp_path, first() | second() | pair("lora_unet_nowhere", 4, 4))
    assert len(contents.patches) == 2 * LAYERS
    assert contents.unmatched == ("lora_unet_nowhere",)


def test_a_text_encoder_alone_is_applied_and_keeps_the_base_that_it_was_made_for(tmp_path):
    """The encoder is the same one bit for bit, so it does what it was trained to; the report says whose it is."""
    for metadata, word, base in (
        (SD1, "lora_te_", "SD 1.5"),
        (None, "lora_te_", "SD 1.5"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "lora_te1_", "Flux"),
        (None, "lora_te1_", "unknown"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "lora_te1_", "SDXL"),
    ):
        contents = read(tmp_path, first(word), metadata)
        assert (contents.base_model, len(contents.patches)) == (base, LAYERS)
    assert read(tmp_path, second(), SD1).base_model == "SDXL"  # SD 1.5 has no second one


def test_a_few_strays_of_another_family_do_not_condemn_a_unet(tmp_path):
    """Where most of the UNet's modules fit the file is ours, whatever its strays and its metadata say."""
    tensors = unet(0, 1, 2, 3) | pair("lora_unet_double_blocks_0_img_attn_qkv", 96, 96) | pair(SD1_UNET, 320, 768)
    contents = read(tmp_path, tensors, SD1)
    assert len(contents.patches) == 4
    assert len(contents.unmatched) == 2


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({"ss_sd_model_name": "SSD-1B.safetensors"}, "SSD-1B"),
        ({"modelspec.architecture": "kolors/lora"}, "Kolors"),
        ({"ss_base_model_version": "playground-v2.5"}, "Playground v2"),
        ({"ss_sd_model_name": "ponyDiffusionV6XL.safetensors", "ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"ss_base_model_version": "illustrious-xl-v1"}, "SDXL"),
        ({"ss_base_model_version": "noobai"}, "SDXL"),
        ({"ss_base_model_version": "flux"}, "SDXL"),
    ],
)
def test_relatives_are_taken_and_named(tmp_path, metadata, base):
    """Models with SDXL's own layout on other weights are told by their metadata alone; their LoRAs are applied."""
    assert read(tmp_path, unet(0, 1, 2, 3), metadata).base_model == base


def test_a_refiners_lora_needs_the_refiner(tmp_path):
    """Without one it is refused as the refiner's; with one it lands there, its text encoder with it."""
    names = [f"lora_unet_{ATTENTION.format(i).replace('.', '_')}" for i in range(2)]
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}
    tensors = pairs(*names, out=9, inputs=9) | second()
    assert "is for the SDXL refiner, which is not loaded here" in refusal(tmp_path, tensors, metadata)
    assert "the SDXL refiner, which is not loaded" in refusal(tmp_path, pairs(*names, out=9, inputs=9), metadata)
    contents = read(tmp_path, tensors, metadata, TargetNames(BASE | REFINER))
    assert {target.network for target in contents.patches} == {"refiner", "text_encoder_2"}
    assert contents.base_model == "SDXL refiner"


FAMILIES = {
    "lora_unet_double_blocks_0_img_attn_qkv": ("Flux", 3072),
    "transformer.single_transformer_blocks.7.attn.to_q": ("Flux", 3072),
    "lora_transformer_single_transformer_blocks_7_attn_to_q": ("Flux", 3072),
    "diffusion_model.double_blocks.0.img_attn_qkv": ("Hunyuan", 3072),
    "lora_unet_double_blocks_0_img_mlp_fc1": ("Hunyuan", 3072),
    "lora_unet_distilled_guidance_layer_layers_0_in_layer": ("Chroma", 5120),
    "lora_unet_joint_blocks_3_context_block_attn_qkv": ("SD 3", 1536),
    "base_model.model.transformer_blocks.3.attn.add_q_proj": ("SD 3", 1536),
    "transformer.transformer_blocks.3.attn.to_q": ("SD 3", 1536),
    "transformer.transformer_blocks.3.attn.to_k": ("SD 3", 2432),
    "transformer.transformer_blocks.3.attn.add_k_proj": ("Flux or Qwen-Image", 3072),
    "transformer.transformer_blocks.3.img_mlp.net.0.proj": ("Qwen-Image", 3072),
    "lora_unet_transformer_blocks_3_txt_mod_1": ("Qwen-Image", 3072),
    "diffusion_model.blocks.9.cross_attn.k": ("Wan", 5120),
    "lora_unet_blocks_9_self_attn_q": ("Wan", 5120),
    "transformer.blocks.9.ffn.net.0.proj": ("Wan", 5120),
    "transformer.transformer_blocks.0.attn2.to_k": ("PixArt", 1152),
    "lora_unet_blocks_0_cross_attn_kv_linear": ("PixArt", 1152),
    "transformer.transformer_blocks.0.attn1.to_v": ("Sana", 2240),
    "transformer.joint_transformer_blocks.1.attn.to_q": ("AuraFlow", 3072),
    "diffusion_model.layers.1.attention.to_q": ("Z-Image", 3840),
    "transformer.noise_refiner.1.attention.to_q": ("Z-Image", 3840),
    "lora_unet_layers_1_attention_qkv": ("Lumina", 2304),
    "diffusion_model.layers.1.feed_forward.w1": ("Lumina", 2304),
    "lora_unet_blocks_1_attn1_Wqkv": ("Hunyuan", 1408),
    "lora_prior_unet_down_blocks_0_1_attention_attn_to_q": ("Stable Cascade", 2048),
    "unet.down_blocks.1.attentions.0.add_k_proj": ("Kandinsky", 768),
    "diffusion_model.double_stream_blocks.0.block.attn1.to_q": ("HiDream", 2560),
    "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attn1.to_q": ("AnimateDiff", 320),
    "base_model.model.model.layers.0.self_attn.q_proj": ("a transformer", 4096),
}


@pytest.mark.parametrize("module", FAMILIES)
def test_a_family_is_told_by_names_and_widths(tmp_path, module):
    """In the original's and in diffusers' names, flat and dotted; the refusal says which it is."""
    family, width = FAMILIES[module]
    assert base_of({module: (0, width)}, {}) == family
    assert f"it is for {family} (" in refusal(tmp_path, pair(module, 4, width))


OURS = (
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_2_attentions_1_proj_in",
    "lora_unet_up_blocks_0_upsamplers_0_conv",
    "unet.down_blocks.0.resnets.0.conv1",
    "base_model.model.conv_out",
    "diffusion_model.output_blocks.2.2.conv",
    "lycoris_down_blocks_0_downsamplers_0_conv",
    "unet.time_embedding.linear_1",
    "lora_unet_label_emb_0_0",
)


@pytest.mark.parametrize("module", OURS)
def test_no_module_of_ours_is_taken_for_another_family_s(module):
    """A name that SDXL's UNet has tells SDXL, or nothing."""
    assert base_of({module: (0, 640)}, {}) in ("SDXL", "unknown")


WHAT_ELSE = {
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "an IP-Adapter,": ["image_proj.norm.weight", *(f"ip_adapter.0.to_q_lora.{half}.weight" for half in ("up", "down"))],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"],
    "a T2I-Adapter,": ["body.0.block1.weight", "conv_in.weight"],
    "an upscaler": ["conv_first.weight", "body.0.rdb1.conv1.weight"],
    "an upscaler,": ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"],
    "a hypernetwork": ["768.0.linear.0.weight"],
    "an image encoder": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
    "a text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a ControlNet": ["lora_controlnet", "input_blocks.4.1.transformer_blocks.0.attn1.to_q.up"],
    "a VAE": ["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"],
    "a whole Flux model": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    "a whole SD 3 model": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "of the kind hra": ["base_model.model.conv_in.hra_u"],
    "of the kind T-LoRA": [f"lora_unet_conv_in.{part}" for part in ("q_layer.weight", "lambda_layer")],
}  # fmt: skip


@pytest.mark.parametrize("what", WHAT_ELSE)
def test_what_is_no_lora_is_called_by_its_name(tmp_path, what):
    """Also where some of its tensors look like a LoRA's; the sentence ends in what to do."""
    problem = refusal(tmp_path, {key: torch.ones(4, 4) for key in WHAT_ELSE[what]})
    assert what.rstrip(",") in problem
    assert "choose" in problem or "load it" in problem
