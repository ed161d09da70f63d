"""Single-file checkpoints: the same networks as those they were written from; clear words for anything else."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from impasto.engine.engine import Engine
from impasto.errors import ModelError
from impasto.models.catalog import find_model
from impasto.models.sdxl import Sdxl
from impasto.types import GenerationRequest, ImageReady
from tests.single_file import save_single_file

VOCABULARY = 49408


@pytest.fixture(scope="module")
def networks():
    """SDXL with 64 channels a head, as the real one has, and few of everything else."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 64,
        cross_attention_dim=128,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    first = CLIPTextModel(clip_config("quick_gelu"))
    second = CLIPTextModelWithProjection(clip_config("gelu"))
    return [network.eval() for network in (unet, vae, first, second)]


def clip_config(activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=64,
        hidden_act=activation,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=1,
    )


@pytest.fixture(scope="module")
def checkpoint(networks, tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("single") / "model.safetensors", *networks)


def load(path, dtype=torch.float32) -> Sdxl:
    return Sdxl.load(find_model(str(path)), torch.device("cpu"), dtype)


def test_every_tensor_arrives_where_it_came_from(networks, checkpoint):
    """Written under the original names and read back: bit for bit, in every network."""
    loaded = load(checkpoint)
    for ours, theirs in zip((loaded.unet, loaded.vae, *loaded.text_encoders), networks, strict=True):
        a, b = ours.state_dict(), theirs.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_configuration_read_off_the_shapes_computes_the_same(networks, checkpoint):
    """Heads, depths, projections and activations are right: outputs equal, not only weights."""
    loaded = load(checkpoint)
    unet, vae, first, second = networks
    with torch.inference_mode():
        ids = torch.tensor([[VOCABULARY - 2, 320, 1125, VOCABULARY - 1] + [VOCABULARY - 1] * 73])
        for ours, theirs in zip(loaded.text_encoders, (first, second), strict=True):
            assert torch.equal(ours(ids)[0], theirs(ids)[0])
        x, tokens = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 128)
        extra = {"text_embeds": torch.randn(1, 64), "time_ids": torch.ones(1, 6)}
        a, b = (net(x, 5, tokens, added_cond_kwargs=extra).sample for net in (loaded.unet, unet))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(loaded.vae.decode(x).sample, vae.decode(x).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_in_any_dtype(networks, tmp_path, dtype):
    """The file's dtype and the running dtype are independent."""
    path = save_single_file(tmp_path / "half.safetensors", *networks, dtype=dtype)
    assert load(path).unet.dtype == torch.float32
    assert load(path, dtype).unet.dtype == dtype


def test_a_picture_comes_out(checkpoint):
    """The whole way from one file to a picture."""
    request = GenerationRequest("a fox", width=512, height=512, num_inference_steps=1, seed=1)
    events = Engine.load(str(checkpoint), device="cpu").generate(request)
    [picture] = [event.image for event in events if isinstance(event, ImageReady)]
    assert picture.size == (512, 512)


def test_velocity_and_zero_snr_marks_are_obeyed(checkpoint, tmp_path):
    """An empty tensor is all that tells these checkpoints apart."""
    assert load(checkpoint).scheduler_config["prediction_type"] == "epsilon"
    tensors = load_file(checkpoint) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, tmp_path / "v.safetensors")
    config = load(tmp_path / "v.safetensors").scheduler_config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)


OTHERS = {
    "a LoRA": {"lora_unet_x.lora_down.weight": (4, 8)},
    "a Flux model": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4)},
    "a Stable Diffusion 1 checkpoint": {
        "cond_stage_model.transformer.text_model.x": (1,),
        "model.diffusion_model.x": (1,),
    },
    "a Stable Diffusion 2 checkpoint": {"cond_stage_model.model.transformer.x": (1,)},
    "a textual-inversion embedding": {"clip_g": (2, 1280), "clip_l": (2, 768)},
    "an SDXL refiner": {"conditioner.embedders.0.model.ln_final.weight": (1280,), "model.diffusion_model.x": (1,)},
    "a UNet alone in diffusers' layout": {"down_blocks.0.resnets.0.conv1.weight": (1,)},
    "UNet without its text encoders": {"model.diffusion_model.y.attn2.to_k.weight": (4, 2048)},
    "no checkpoint we know": {"something.else": (1,)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_named_for_what_they_are(tmp_path, kind):
    """One sentence that says what the file is."""
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in OTHERS[kind].items()}, path)
    with pytest.raises(ModelError, match=kind):
        load(path)


def test_broken_files_are_errors(checkpoint, tmp_path):
    """Truncated, a pickle, a tensor too many, a tensor too few, a network missing."""
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    tensors = load_file(checkpoint)
    first, later = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.0.bias"
    save_file(tensors | {"stray.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file(tensors | {"model.diffusion_model.stray": torch.zeros(1)}, tmp_path / "odd.safetensors")
    save_file({k: v for k, v in tensors.items() if k != first}, tmp_path / "less.safetensors")
    save_file({k: v for k, v in tensors.items() if k != later}, tmp_path / "bare.safetensors")
    save_file({k: v for k, v in tensors.items() if "first_stage" not in k}, tmp_path / "blind.safetensors")
    cases = {
        "cut.safetensors": "not a whole safetensors file",
        "model.ckpt": "a pickle could run anything",
        "more.safetensors": "1 tensors are not SDXL's, first 'stray.weight'",
        "odd.safetensors": "'stray' is not SDXL's",
        "less.safetensors": "UNet: tensors are missing, such as 'conv_in.weight'",
        "bare.safetensors": "1 tensors missing or unknown, first 'conv_norm_out.bias'",
        "blind.safetensors": "a network is missing",
    }
    for name, phrase in cases.items():
        with pytest.raises(ModelError, match=phrase):
            load(tmp_path / name)
