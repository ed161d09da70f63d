"""The same files through the trainers' own code: LyCORIS' live forward, PEFT's layers, diffusers' loader.

Each is asked only where it is right (docs/lora-conformance.md says where it is not): LyCORIS' forward pass, never its
merge, which scales LoHa and LoKr twice; PEFT's layers; diffusers for plain LoRAs.
"""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import nn

from impasto.errors import LoraError
from impasto.lora.formats import read_lora
from impasto.lora.keys import Target, TargetNames
from tests.random_sdxl import save_random_sdxl

RELATIVE = 1e-5
STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 4.0)

LYCORIS = {
    "LoCon": (LoConModule, {"lora_dim": 3, "alpha": 1.5}),
    "LoCon, Tucker": (LoConModule, {"lora_dim": 3, "alpha": 1.5, "use_tucker": True}),
    "LoCon, rank-stabilised": (LoConModule, {"lora_dim": 4, "alpha": 3, "rs_lora": True}),
    "LoCon, with a scalar": (LoConModule, {"lora_dim": 4, "alpha": 3, "use_scalar": True}),
    "LoHa": (LohaModule, {"lora_dim": 3, "alpha": 1}),
    "LoHa, Tucker": (LohaModule, {"lora_dim": 3, "alpha": 1, "use_tucker": True}),
    "LoKr": (LokrModule, {"lora_dim": 2, "alpha": 1}),
    "LoKr, both factored": (LokrModule, {"lora_dim": 1, "alpha": 2, "decompose_both": True}),
    "LoKr, whole": (LokrModule, {"lora_dim": 100, "alpha": 1, "full_matrix": True}),
    "LoKr, Tucker": (LokrModule, {"lora_dim": 2, "alpha": 1, "use_tucker": True}),
    "LoKr, factor 4": (LokrModule, {"lora_dim": 2, "alpha": 3, "factor": 4}),
    "GLoRA": (GLoRAModule, {"lora_dim": 3, "alpha": 1}),
    "diag-OFT": (DiagOFTModule, {"lora_dim": 4, "constraint": 0}),
    "diag-OFT, constrained": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0}),
    "BOFT, constrained": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.01}),
    "IA3, outputs": (IA3Module, {}),
    "IA3, inputs": (IA3Module, {"train_on_input": True}),
}
# Right at strength 1 alone: beside it LyCORIS rescales in full at once, and moves DoRA's length apart from its delta.
LYCORIS_AT_ONE = {
    "DoRA, outputs": (LoConModule, {"lora_dim": 3, "alpha": 1.5, "weight_decompose": True}),
    "DoRA, inputs": (LoConModule, {"lora_dim": 3, "alpha": 1.5, "weight_decompose": True, "wd_on_out": False}),
    "DoRA on LoHa": (LohaModule, {"lora_dim": 3, "alpha": 1, "weight_decompose": True}),
    "DoRA on LoKr": (LokrModule, {"lora_dim": 2, "alpha": 1, "weight_decompose": True}),
    "diag-OFT, rescaled": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "BOFT, rescaled": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
}
LAYERS = {
    "linear": lambda: nn.Linear(12, 16),
    "1x1": lambda: nn.Conv2d(12, 16, 1),
    "3x3": lambda: nn.Conv2d(12, 16, 3, padding=1),
}


def seeded_layer(make) -> nn.Module:
    torch.manual_seed(0)
    return make().requires_grad_(requires_grad=False)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer acts with, read off its answers to unit inputs, without its bias."""
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            base = layer(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype))
            return (layer(torch.eye(layer.in_features, dtype=layer.weight.dtype)) - base).T
        side = 5
        shape = (layer.in_channels, layer.in_channels, side, side)
        units = torch.zeros(shape, dtype=layer.weight.dtype)
        units[range(layer.in_channels), range(layer.in_channels), side // 2, side // 2] = 1
        answers = layer(units) - layer(torch.zeros_like(units))
        reach = layer.kernel_size[0] // 2
        window = slice(side // 2 - reach, side // 2 + reach + 1)
        return answers[:, :, window, window].flip(2, 3).transpose(0, 1)


def ours(
    path: Path, tensors: dict, layer: nn.Module, strength: float, metadata=None, name="lora_unet_x"
) -> torch.Tensor:
    """The weight by our reading of the file."""
    save_file({f"{name}.{part}": tensor.detach().contiguous() for part, tensor in tensors.items()}, path, metadata)
    target = Target("unet", "x")
    contents = read_lora(path, TargetNames({target: tuple(layer.weight.shape)}))
    assert set(contents.patches) == {target}
    return contents.patches[target].patched(layer.weight.detach(), strength)


def agree(found: torch.Tensor, wanted: torch.Tensor, own: torch.Tensor) -> None:
    """Equal to 1e-5 of the weight's change, with a few roundings of float32 for reading the weight off."""
    change = (wanted - own).abs().max().item()
    error = (found - wanted).abs().max().item()
    assert error <= RELATIVE * change + 4e-7 * wanted.abs().max().item(), error / max(change, 1e-30)


def lycoris_module(kind, layer: nn.Module, strength: float, options: dict):
    """LyCORIS' module on a layer, every trained number random."""
    torch.manual_seed(1)
    module = kind("lora_unet_x", layer, multiplier=strength, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "dora_scale" in name or "rescale" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_live_forward(tmp_path, kind, layer, strength):
    """What LyCORIS computes in training is what we make of the file that it saves."""
    _against_lycoris(tmp_path, *LYCORIS[kind], layer, strength)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", LYCORIS_AT_ONE)
def test_lycoris_live_forward_at_full_strength(tmp_path, kind, layer):
    """Kinds whose partial strength we define otherwise agree at full strength."""
    _against_lycoris(tmp_path, *LYCORIS_AT_ONE[kind], layer, 1.0)


def _against_lycoris(folder: Path, kind, options: dict, layer: str, strength: float) -> None:
    base = seeded_layer(LAYERS[layer])
    own = base.weight.detach().clone()
    module = lycoris_module(kind, base, strength, options)
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = ours(folder / "a.safetensors", tensors, base, strength)
    module.apply_to()
    agree(found, weight_of(base), own)


def test_lycoris_norm_and_full_difference(tmp_path):
    """Norms and whole differences of LyCORIS are sums, weight and bias."""
    norm = seeded_layer(lambda: nn.LayerNorm(16))
    module = lycoris_module(NormModule, norm, 0.5, {})
    save_file({f"lora_unet_x.{n}": t.detach() for n, t in module.state_dict().items()}, tmp_path / "norm.safetensors")
    x = torch.randn(4, 16)
    targets = {Target("unet", "x", p): (16,) for p in ("weight", "bias")}
    patches = read_lora(tmp_path / "norm.safetensors", TargetNames(targets)).patches
    weight, bias = (patches[Target("unet", "x", p)].patched(getattr(norm, p), 0.5) for p in ("weight", "bias"))
    torch.testing.assert_close(nn.functional.layer_norm(x, (16,), weight, bias), module(x), rtol=1e-5, atol=1e-6)

    linear = seeded_layer(LAYERS["linear"])
    own = linear.weight.detach().clone()
    full = FullModule("lora_unet_x", linear)
    torch.nn.init.normal_(full.weight)
    found = ours(tmp_path / "full.safetensors", {"diff": full.weight.detach()}, linear, 1.0)
    agree(found, full.get_merged_weight(1.0, own.shape)[0].detach(), own)


PEFT_KINDS = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=2, target_modules=["x"], init_lora_weights=False),
    "LoRA, rank-stabilised": peft.LoraConfig(
        r=3, lora_alpha=2, use_rslora=True, target_modules=["x"], init_lora_weights=False
    ),
    "LoRA, patterns": peft.LoraConfig(
        r=4, lora_alpha=2, rank_pattern={"x": 3}, alpha_pattern={"x": 5}, target_modules=["x"], init_lora_weights=False
    ),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=2, use_dora=True, target_modules=["x"], init_lora_weights=False),
    "LoHa": peft.LoHaConfig(r=3, alpha=2, target_modules=["x"], init_weights=False),
    "LoHa, effective": peft.LoHaConfig(
        r=3, alpha=2, use_effective_conv2d=True, target_modules=["x"], init_weights=False
    ),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, target_modules=["x"], init_weights=False),
    "LoKr, both factored": peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["x"], init_weights=False),
    "LoKr, whole": peft.LoKrConfig(r=64, alpha=3, target_modules=["x"], init_weights=False),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=["x"], init_weights=False),
    "OFT, exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["x"], init_weights=False),
    "OFT, shared": peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=["x"], init_weights=False),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["x"], init_weights=False),
    "AdaLoRA": peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, lora_alpha=3, target_modules=["x"], init_lora_weights=False
    ),
    "LoRA, the bias trained too": peft.LoraConfig(
        r=3, lora_alpha=2, target_modules=["x"], bias="all", init_lora_weights=False
    ),
    "LoRA, a bias of its own": peft.LoraConfig(
        r=3, lora_alpha=2, target_modules=["x"], lora_bias=True, init_lora_weights=False
    ),
    "IA3": peft.IA3Config(target_modules=["x"], feedforward_modules=[], init_ia3_weights=False),
    "IA3, inputs": peft.IA3Config(target_modules=["x"], feedforward_modules=["x"], init_ia3_weights=False),
}


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.x = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.x(x)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_peft(tmp_path, kind, layer):
    """What PEFT merges is what we make of its folder: the weights' file and the configuration beside it."""
    own, found, wanted = _against_peft(tmp_path, PEFT_KINDS[kind], seeded_layer(LAYERS[layer]))
    for parameter in ("weight", "bias"):
        agree(found[parameter], wanted[parameter], own[parameter])
    assert (wanted["weight"] - own["weight"]).abs().max() > 1e-4


def _against_peft(folder: Path, config: peft.PeftConfig, base: nn.Module) -> tuple[dict, dict, dict]:
    """The layer's own parameters, ours by reading PEFT's folder, and PEFT's after merging."""
    own = {name: value.detach().clone() for name, value in base.named_parameters()}
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Holder(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        merged = model.merge_and_unload().x
    wanted = {name: value.detach().clone() for name, value in merged.named_parameters()}
    path = folder / "adapter_model.safetensors"
    targets = {Target("unet", "x", name): tuple(value.shape) for name, value in own.items()}
    patches = read_lora(path, TargetNames(targets)).patches
    found = {name: value.clone() for name, value in own.items()}
    for target, patch in patches.items():
        found[target.parameter] = patch.patched(own[target.parameter], 1.0)
    return own, found, wanted


def test_peft_vera(tmp_path):
    """VeRA, whose modules share their matrices, cut to each module's size (PEFT has it for linears)."""
    config = peft.VeraConfig(r=4, target_modules=["x"], init_weights=False)
    own, found, wanted = _against_peft(tmp_path, config, seeded_layer(LAYERS["linear"]))
    agree(found["weight"], wanted["weight"], own["weight"])
    assert (wanted["weight"] - own["weight"]).abs().max() > 1e-4


def test_peft_vera_without_its_matrices_is_refused(tmp_path):
    """They could be drawn again from a seed by the same code alone; the error says how to save them."""
    with pytest.warns(UserWarning, match="save_projection"):
        config = peft.VeraConfig(r=4, target_modules=["x"], save_projection=False)
    with pytest.raises(LoraError, match="save_projection"):
        _against_peft(tmp_path, config, seeded_layer(LAYERS["linear"]))


def test_peft_embedding(tmp_path):
    """A LoRA of a table of embeddings is the product of its halves the other way round."""
    base = seeded_layer(lambda: nn.Embedding(10, 6))
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["x"], init_lora_weights=False)
    own, found, wanted = _against_peft(tmp_path, config, base)
    agree(found["weight"], wanted["weight"], own["weight"])


@pytest.mark.parametrize("stages", [2, 3])
def test_peft_boft_of_several_stages(tmp_path, stages):
    """PEFT multiplies several stages on CUDA alone; here its own permutations and rotations are multiplied out."""
    layer = seeded_layer(lambda: nn.Linear(16, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.BOFTConfig(boft_block_size=4, target_modules=["x"])
        module = peft.get_peft_model(Holder(layer), config).base_model.model.x
    torch.manual_seed(2)
    blocks, scale = torch.randn(stages, 4, 4, 4), 1 + torch.rand(12, 1)
    rotations = module.cayley_batch(blocks.flatten(0, 1)).reshape(blocks.shape)
    whole = torch.eye(16)
    for stage, turns in enumerate(rotations):
        order = module.perm2mat(module.block_butterfly_perm(16, 4 // 2**stage, 2, stages - 1))
        whole = order @ torch.block_diag(*turns) @ order.T @ whole
    wanted = scale * (whole @ layer.weight.T).T
    found = ours(tmp_path / "a.safetensors", {"boft_R": blocks, "boft_s": scale}, layer, 1.0)
    agree(found, wanted, layer.weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small SDXL as a folder."""
    return save_random_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


def pipeline_of(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)


def test_diffusers_saves_and_fuses_what_we_read(folder, tmp_path):
    """A LoRA trained with diffusers, its configuration in the metadata, on the UNet and both text encoders."""
    pipe = pipeline_of(folder)
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    own = {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in networks.items()}
    for name, network in networks.items():
        parts = ["to_k", "to_out.0", "conv1", "proj_in"] if name == "unet" else ["q_proj", "fc1"]
        alphas, ranks = ({"attn2.to_k": 7}, {"proj_in": 2}) if name == "unet" else ({"fc1": 1}, {"fc1": 2})
        torch.manual_seed(3)
        network.add_adapter(
            peft.LoraConfig(
                r=3, lora_alpha=2, target_modules=parts, alpha_pattern=alphas, rank_pattern=ranks,
                init_lora_weights=False,
            )
        )  # fmt: skip
    layers = {name: peft.get_peft_model_state_dict(network) for name, network in networks.items()}
    packed = {
        f"{name}.{key}": value
        for name, network in networks.items()
        for key, value in _plain(network.peft_config["default"]).items()
    }
    tensors = {f"{name}.{key}": tensor.contiguous() for name, state in layers.items() for key, tensor in state.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(packed)})
    shapes = {
        Target(name, module, parameter): tuple(tensor.shape)
        for name, state in own.items()
        for key, tensor in state.items()
        for module, _, parameter in [key.rpartition(".")]
        if parameter in ("weight", "bias")
    }
    contents = read_lora(tmp_path / "a.safetensors", TargetNames(shapes))
    assert not contents.unmatched
    assert not contents.mismatched
    assert len(contents.patches) == len(tensors) // 2
    for target, patch in contents.patches.items():
        layer = networks[target.network].get_submodule(target.module)
        before = own[target.network][f"{target.module}.weight"]
        wanted = before + layer.get_delta_weight("default").detach()
        agree(patch.patched(before, 1.0), wanted, before)


def _plain(config: peft.LoraConfig) -> dict:
    return {key: value for key, value in config.to_dict().items() if isinstance(value, int | float | bool | str | dict)}


def test_diffusers_loads_and_fuses_the_same_kohya_file(folder, tmp_path):
    """A kohya file with original names and one alpha: diffusers' own fused weights are ours."""
    pipe = pipeline_of(folder)
    own = {f"unet.{key}": value.clone() for key, value in pipe.unet.state_dict().items()}
    torch.manual_seed(4)
    tensors = {}
    names = {
        "input_blocks_4_1_transformer_blocks_0_attn2_to_k": (16, 40),
        "output_blocks_5_1_transformer_blocks_0_attn1_to_q": (16, 16),
        "middle_block_1_proj_in": (16, 16),
    }
    for name, (out, inputs) in names.items():
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": torch.randn(3, inputs),
            f"lora_unet_{name}.lora_up.weight": torch.randn(out, 3),
            f"lora_unet_{name}.alpha": torch.tensor(1.5),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    shapes = {
        Target("unet", key.removeprefix("unet.").rpartition(".")[0]): tuple(tensor.shape)
        for key, tensor in own.items()
        if key.endswith("weight")
    }
    contents = read_lora(tmp_path / "a.safetensors", TargetNames(shapes))
    assert len(contents.patches) == 3
    for target, patch in contents.patches.items():
        before = own[f"unet.{target.module}.weight"]
        agree(patch.patched(before, 0.7), pipe.unet.get_submodule(target.module).weight.detach(), before)
