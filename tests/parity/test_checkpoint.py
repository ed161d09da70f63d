"""Single-file checkpoints: the same networks as those they were written from; clear words for anything else."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from impasto.engine.engine import Engine
from impasto.errors import ModelError
from impasto.models.catalog import find_model
from impasto.models.networks import Dtypes, Networks, load_networks
from impasto.models.original import unet_config
from impasto.types import GenerationRequest, ImageReady
from tests.single_file import save_single_file, save_single_refiner

VOCABULARY = 49408
UNET = "model.diffusion_model."
REFINER = {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}


@pytest.fixture(scope="module")
def networks():
    """SDXL with 64 channels a head, as the real one has, and few of everything else."""
    torch.manual_seed(0)
    return [network.eval() for network in (base_unet(), vae(), clip_l(), clip_g())]


def base_unet(channels_in: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=channels_in,
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


def refiner_unet() -> UNet2DConditionModel:
    """The refiner's shape: four levels, attention on the middle two and in the mid block, five size ids."""
    return UNet2DConditionModel(
        block_out_channels=(64, 64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=(1, 1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=5 * 256 + 64,
        cross_attention_dim=64,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
    )


def clip_l() -> CLIPTextModel:
    return CLIPTextModel(clip_config("quick_gelu"))


def clip_g() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config("gelu"))


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


@pytest.fixture(scope="module")
def refiner(networks, tmp_path_factory):
    """A refiner's UNet, and its file: VAE and second encoder are the base's."""
    torch.manual_seed(1)
    unet = refiner_unet().eval()
    path = tmp_path_factory.mktemp("single") / "refiner.safetensors"
    return unet, save_single_refiner(path, unet, networks[1], networks[3])


def load(path, dtype=torch.float32, **options) -> Networks:
    return load_networks(find_model(str(path)), Dtypes.all(dtype), **options)


def equal(ours, theirs) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def predicted(unet, channels: int, width: int, size_ids: int):
    """One answer of a UNet to fixed random inputs."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(1, channels, 16, 16, generator=draw)
    tokens = torch.randn(1, 77, width, generator=draw)
    extra = {"text_embeds": torch.randn(1, 64, generator=draw), "time_ids": torch.ones(1, size_ids)}
    with torch.inference_mode():
        return unet(x, 5, tokens, added_cond_kwargs=extra).sample


def test_every_tensor_arrives_where_it_came_from(networks, checkpoint):
    """Written under the original names and read back: bit for bit, in every network."""
    loaded = load(checkpoint)
    assert (loaded.kind, loaded.zero_absent_negative, loaded.aesthetic) == ("base", True, False)
    for ours, theirs in zip((loaded.unet, loaded.vae, *loaded.text_encoders), networks, strict=True):
        assert equal(ours, theirs)


def test_the_configuration_read_off_the_shapes_computes_the_same(networks, checkpoint):
    """Heads, depths, projections and activations are right: outputs equal, not only weights."""
    loaded = load(checkpoint)
    unet, vae, first, second = networks
    with torch.inference_mode():
        ids = torch.tensor([[VOCABULARY - 2, 320, 1125, VOCABULARY - 1] + [VOCABULARY - 1] * 73])
        for ours, theirs in zip(loaded.text_encoders, (first, second), strict=True):
            assert torch.equal(ours(ids)[0], theirs(ids)[0])
        x = torch.randn(1, 4, 16, 16)
        torch.testing.assert_close(loaded.vae.decode(x).sample, vae.decode(x).sample)
    torch.testing.assert_close(predicted(loaded.unet, 4, 128, 6), predicted(unet, 4, 128, 6))


def test_an_inpainting_checkpoint_is_told_by_its_nine_channels(networks, tmp_path):
    """A base layout whose UNet also reads the mask and the masked picture."""
    unet = base_unet(channels_in=9).eval()
    path = save_single_file(tmp_path / "inpaint.safetensors", unet, *networks[1:])
    loaded = load(path)
    assert find_model(str(path)).kind == loaded.kind == "inpaint"
    assert equal(loaded.unet, unet)
    torch.testing.assert_close(predicted(loaded.unet, 9, 128, 6), predicted(unet, 9, 128, 6))


def test_a_refiner_checkpoint_loads_whole(networks, refiner):
    """Four levels, the mid block's own depth, five size ids, one text encoder; outputs equal."""
    unet, path = refiner
    loaded = load(path)
    assert find_model(str(path)).kind == loaded.kind == "refiner"
    assert (loaded.zero_absent_negative, loaded.aesthetic, len(loaded.tokenizers)) == (False, True, 1)
    for ours, theirs in zip((loaded.unet, loaded.vae, *loaded.text_encoders), (unet, *networks[1::2]), strict=True):
        assert equal(ours, theirs)
    torch.testing.assert_close(predicted(loaded.unet, 4, 64, 5), predicted(unet, 4, 64, 5))


def test_the_real_refiner_is_read_off_its_shapes():
    """Stability's own configuration, from tensors that have shapes and no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**REFINER)
    found = unet_config(unet.state_dict(), pooled=1280, size_ids=5)
    with torch.device("meta"):
        ours = UNet2DConditionModel(**found)
    assert found["addition_time_embed_dim"] == 256
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in unet.state_dict().items()}
    heads = [module.heads for module in unet.modules() if isinstance(module, Attention)]
    assert [module.heads for module in ours.modules() if isinstance(module, Attention)] == heads


def test_a_part_can_be_loaded_alone(refiner):
    """A refiner that shares the base's encoder and VAE costs its UNet."""
    unet, path = refiner
    loaded = load(path, parts=("unet",))
    assert equal(loaded.unet, unet)
    assert (loaded.vae, loaded.text_encoders, loaded.tokenizers) == (None, (), ())
    loaded = load(path, parts=("vae", "text"))
    assert loaded.unet is None and loaded.vae is not None and len(loaded.text_encoders) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_in_any_dtype(networks, tmp_path, dtype):
    """The file's dtype and the running dtype are independent."""
    path = save_single_file(tmp_path / "half.safetensors", *networks, dtype=dtype)
    assert load(path).unet.dtype == torch.float32
    assert load(path, dtype).unet.dtype == dtype


def test_a_vae_that_would_overflow_float16_runs_in_float32(networks, checkpoint):
    """And from the file's own precision, not from rounded weights."""
    loaded = load(checkpoint, torch.float16)
    assert (loaded.unet.dtype, loaded.vae.dtype) == (torch.float16, torch.float32)
    assert equal(loaded.vae, networks[1])
    assert load(checkpoint, torch.bfloat16).vae.dtype == torch.bfloat16


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


def test_what_is_known_to_carry_no_weights_is_passed_over(checkpoint, tmp_path):
    """Buffers of the training code, and a projection of the first encoder that SDXL never uses."""
    extra = {
        "denoiser.sigmas": torch.zeros(1000),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.0.transformer.text_projection.weight": torch.zeros(64, 64),
        "conditioner.embedders.0.logit_scale": torch.zeros(1),
    }
    save_file(load_file(checkpoint) | extra, tmp_path / "extra.safetensors")
    assert load(tmp_path / "extra.safetensors").kind == "base"


def test_broken_files_are_errors(checkpoint, refiner, tmp_path):
    """A tensor too many, too few or of another shape; a network missing."""
    tensors = load_file(checkpoint)
    first, later = UNET + "input_blocks.0.0.weight", UNET + "out.0.bias"
    files = {
        "more": tensors | {"stray.weight": torch.zeros(1)},
        "odd": tensors | {UNET + "stray": torch.zeros(1)},
        "less": without(tensors, first),
        "bare": without(tensors, later),
        "bent": tensors | {later: torch.zeros(3)},
        "wide": tensors | {first: torch.zeros(64, 8, 3, 3)},
        "blind": without(tensors, "first_stage_model."),
        "deaf": without(tensors, "conditioner.embedders.0."),
        "flat": without(load_file(refiner[1]), UNET + "middle_block.1."),
        "blank": {key: torch.zeros(()) for key in tensors},
    }
    cases = {
        "more": "1 tensors are not SDXL's, first 'stray.weight'",
        "odd": "'stray' is not SDXL's",
        "less": "unet: tensors are missing, such as 'conv_in.weight'",
        "bare": "1 tensors missing, unknown or of another shape, first 'conv_norm_out.bias'",
        "bent": "1 tensors missing, unknown or of another shape, first 'conv_norm_out.bias'",
        "wide": r"reads 8 channels; 4 \(base\) and 9 \(inpainting\) are known",
        "blind": "has no vae",
        "deaf": "has no text_encoder",
        "flat": r"tensors missing, unknown or of another shape, first 'mid_block\.attentions",
        "blank": "not shaped as SDXL's",
    }
    assert files.keys() == cases.keys()
    for name, phrase in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(files[name], path)
        with pytest.raises(ModelError, match=phrase):
            load(path)


def without(tensors, prefix: str):
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
