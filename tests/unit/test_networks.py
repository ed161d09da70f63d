"""Networks of a folder: each kind's own set, the asked dtypes and parts, and a named error for what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.errors import ModelError
from impasto.models.catalog import find_model
from impasto.models.networks import Dtypes, load_networks
from tests.random_sdxl import WIDTHS, save_random_inpaint, save_random_refiner, save_random_sdxl

WHOLE = Dtypes.all(torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model's folder; a test that changes it copies it first."""
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    """The refiner that goes with it."""
    return save_random_refiner(tmp_path_factory.mktemp("models") / "refiner")


def load(folder, dtypes=WHOLE, **options):
    return load_networks(find_model(str(folder)), dtypes, **options)


def weights(network):
    return network.state_dict()


def same(a, b) -> bool:
    return weights(a).keys() == weights(b).keys() and all(torch.equal(weights(a)[k], weights(b)[k]) for k in weights(a))


def test_a_base_model(base):
    """Two encoders, in order, with their tokenizers; an absent negative prompt is zeros."""
    loaded = load(base)
    assert (loaded.kind, loaded.zero_absent_negative, loaded.aesthetic) == ("base", True, False)
    assert [encoder.config.hidden_size for encoder in loaded.text_encoders] == list(WIDTHS)
    assert len(loaded.tokenizers) == 2
    assert loaded.scheduler_config["steps_offset"] == 1
    assert not any(p.requires_grad for p in loaded.unet.parameters()) and not loaded.unet.training


def test_an_inpainting_model(tmp_path):
    """Nine channels in."""
    loaded = load(save_random_inpaint(tmp_path / "m"))
    assert (loaded.kind, loaded.unet.config.in_channels) == ("inpaint", 9)


def test_a_refiner(base, refiner):
    """One encoder and the VAE, both equal to the base's."""
    loaded, other = load(refiner), load(base)
    assert (loaded.kind, loaded.zero_absent_negative, loaded.aesthetic) == ("refiner", False, True)
    [encoder] = loaded.text_encoders
    assert same(encoder, other.text_encoders[1]) and same(loaded.vae, other.vae)
    assert len(loaded.tokenizers) == 1


def test_each_part_has_its_dtype(base):
    """Unet, VAE and text are told apart."""
    loaded = load(base, Dtypes(unet=torch.bfloat16, vae=torch.float32, text=torch.float16))
    assert (loaded.unet.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    assert {encoder.dtype for encoder in loaded.text_encoders} == {torch.float16}


def test_a_vae_says_whether_it_overflows_float16(base, tmp_path):
    """With ``force_upcast`` it runs in float32, from unrounded weights; without, as asked."""
    half = Dtypes.all(torch.float16)
    loaded = load(base, half)
    assert (loaded.unet.dtype, loaded.vae.dtype) == (torch.float16, torch.float32)
    assert same(loaded.vae, load(base).vae)
    folder = copy(base, tmp_path)
    edit(folder / "vae" / "config.json", force_upcast=False)
    assert load(folder, half).vae.dtype == torch.float16


def test_a_part_can_be_loaded_alone(refiner, tmp_path):
    """What is not asked for is not even looked at."""
    folder = copy(refiner, tmp_path)
    for part in ("vae", "text_encoder_2"):
        (folder / part / "config.json").unlink()
    loaded = load(folder, parts=("unet",))
    assert loaded.unet is not None and loaded.scheduler_config
    assert (loaded.vae, loaded.text_encoders, loaded.tokenizers) == (None, (), ())


def test_the_half_precision_variant_alone_is_loaded(base, tmp_path):
    """As fetching from the hub leaves a folder; in whatever dtype is asked."""
    folder = copy(base, tmp_path)
    for path in list(folder.rglob("*.safetensors")):
        save_file({k: t.half() for k, t in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    loaded = load(folder)
    assert loaded.unet.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, load(base).unet.conv_in.weight.half().float())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_load(base, tmp_path, variant):
    """As diffusers cuts large ones up."""
    folder, whole = copy(base, tmp_path), load(base).unet
    shutil.rmtree(folder / "unet")
    whole.save_pretrained(folder / "unet", max_shard_size="300KB", variant=variant)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert same(load(folder).unet, whole)


def test_what_is_wrong_is_named(base, tmp_path):
    """The part, and what of it."""
    cut, bare, odd, wide, mute, deaf = (copy(base, tmp_path / str(i)) for i in range(6))
    weights = "unet/diffusion_pytorch_model.safetensors"
    (cut / weights).write_bytes((base / weights).read_bytes()[:5000])
    (bare / weights).rename(bare / "unet" / "diffusion_pytorch_model.bin")
    save_file(load_file(base / weights) | {"stray": torch.zeros(1)}, odd / weights)
    edit(wide / "unet" / "config.json", in_channels=5)
    (mute / "tokenizer_2" / "tokenizer.json").unlink()
    edit(deaf / "tokenizer" / "tokenizer.json", model=None)
    cases = {
        cut: "unet cannot be loaded",
        bare: r"unet has no \.safetensors file \(pickles are not loaded\)",
        odd: "unet: 1 tensors missing or unknown, first 'stray'",
        wide: "unet",
        mute: r"tokenizer_2 has neither tokenizer\.json nor vocab\.json",
        deaf: "tokenizer cannot be loaded",
    }
    for folder, phrase in cases.items():
        with pytest.raises(ModelError, match=phrase):
            load(folder)


def copy(folder, to):
    return shutil.copytree(folder, to / "copy")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
