"""LoRA files: every spelling finds its module, the maths is the closed formula, restore is bit for bit."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from impasto.errors import LoraError
from impasto.lora.apply import Adapters
from impasto.lora.keys import Target, TargetNames
from impasto.lora.patch import LowRank
from impasto.types import LoraRef


def low_rank(out, inner, rank, seed=0, kernel=()):
    """Random ``down [r, in, *kernel]`` and ``up [out, r, 1, 1]``."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inner, *kernel, generator=generator)
    return down, torch.randn(out, rank, *(1 for _ in kernel), generator=generator)


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
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


@pytest.fixture(scope="module")
def sdxl_names() -> TargetNames:
    """The module names of the real SDXL UNet, from its real configuration, without its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    unet_names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return TargetNames({"unet": unet_names, "text_encoder": ["encoder.layers.0.mlp.fc1"], "text_encoder_2": []})


@pytest.mark.parametrize(("original", "diffusers"), SDXL_NAMES.items())
def test_original_and_diffusers_names_mean_the_same_module(sdxl_names, original, diffusers):
    """kohya's original block names, kohya's diffusers names and PEFT's dotted names all find the module."""
    expected = Target("unet", diffusers)
    assert sdxl_names.find(f"lora_unet_{original}") == expected
    assert sdxl_names.find(f"lora_unet_{diffusers.replace('.', '_')}") == expected
    assert sdxl_names.find(f"unet.{diffusers}") == expected


def test_every_original_name_of_the_unet_is_covered(sdxl_names):
    """All 722 attention linears that kohya trains by default are found under their original names."""
    found = set()
    blocks = [(f"input_blocks_{i}_1", n) for i, n in [(4, 2), (5, 2), (7, 10), (8, 10)]]
    blocks += [("middle_block_1", 10)] + [(f"output_blocks_{i}_1", 10 if i < 3 else 2) for i in range(6)]
    parts = [f"attn{a}_to_{p}" for a in (1, 2) for p in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    for block, depth in blocks:
        names = ["proj_in", "proj_out"] + [f"transformer_blocks_{d}_{p}" for d in range(depth) for p in parts]
        found |= {sdxl_names.find(f"lora_unet_{block}_{name}") for name in names}
    assert None not in found
    assert len(found) == 722


def test_text_encoder_names_with_and_without_text_model(sdxl_names):
    """Both spellings of text-encoder paths are one module."""
    expected = Target("text_encoder", "encoder.layers.0.mlp.fc1")
    assert sdxl_names.find("lora_te1_text_model_encoder_layers_0_mlp_fc1") == expected
    assert sdxl_names.find("text_encoder.text_model.encoder.layers.0.mlp.fc1") == expected
    assert sdxl_names.find("text_encoder.encoder.layers.0.mlp.fc1") == expected


@pytest.mark.parametrize("name", ["lora_unet_nonsense", "double_blocks.0.img_attn.qkv", "unet.", ""])
def test_unknown_names_are_none(sdxl_names, name):
    """Nothing is guessed."""
    assert sdxl_names.find(name) is None


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_delta_is_the_closed_formula(kernel, dtype):
    """scale * up @ down in float64, to 1e-5 relative, for linears and convolutions of every dtype."""
    down, up = (t.to(dtype) for t in low_rank(6, 5, 3, kernel=kernel))
    shape = torch.Size((6, 5, *kernel))

    delta = LowRank(down, up, scale=0.25).delta(shape)

    expected = 0.25 * np.einsum("or,ri->oi", up.double().flatten(1).numpy(), down.double().flatten(1).numpy())
    np.testing.assert_allclose(delta.numpy().reshape(6, -1), expected, rtol=1e-5, atol=1e-6)
    assert delta.dtype == torch.float32


class Small(nn.Module):
    """One linear and one convolution under UNet-like names."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.to_q = nn.Linear(5, 6)
        self.conv_in = nn.Conv2d(4, 6, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)


def kohya(path, scale_seed=0, rank=2, alpha=None, **extra):
    """A kohya file for both modules of ``Small``."""
    q_down, q_up = low_rank(6, 5, rank, scale_seed)
    c_down, c_up = low_rank(6, 4, rank, scale_seed + 1, kernel=(3, 3))
    tensors = {
        "lora_unet_to_q.lora_down.weight": q_down,
        "lora_unet_to_q.lora_up.weight": q_up,
        "lora_unet_conv_in.lora_down.weight": c_down,
        "lora_unet_conv_in.lora_up.weight": c_up,
    }
    if alpha is not None:
        tensors |= {"lora_unet_to_q.alpha": torch.tensor(alpha), "lora_unet_conv_in.alpha": torch.tensor([alpha])}
    save_file(tensors | extra, path)
    return path, q_up @ q_down


def wearing(adapters: Adapters, *loras: LoraRef):
    """Run with these LoRAs on."""
    return adapters.active(adapters.resolve(loras))


def snapshot(module: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def identical(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_alpha_over_rank_scales_and_absent_alpha_is_one(tmp_path):
    """alpha 1 on rank 2 halves the delta; no alpha leaves it; the request's scale multiplies."""
    for alpha, factor in ((1.0, 0.5), (None, 1.0), (0.0, 0.0), (-2.0, -1.0)):
        path, product = kohya(tmp_path / f"{alpha}.safetensors", alpha=alpha)
        network = Small()
        base = network.to_q.weight.clone()
        with torch.inference_mode(), wearing(Adapters({"unet": network}), LoraRef(str(path), 0.5)):
            torch.testing.assert_close(network.to_q.weight, base + 0.5 * factor * product, rtol=1e-5, atol=1e-6)


def test_stacked_loras_add_up(tmp_path):
    """Two files on one module: the sum of both deltas."""
    (first, a), (second, b) = (kohya(tmp_path / f"{i}.safetensors", i * 10) for i in (1, 2))
    network = Small()
    base = network.to_q.weight.clone()
    with wearing(Adapters({"unet": network}), LoraRef(str(first), 1.0), LoraRef(str(second), 2.0)):
        torch.testing.assert_close(network.to_q.weight, base + a + 2 * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_hundred_switches_restore_bit_for_bit(tmp_path, dtype):
    """However often and in whatever order sets change, the model's own weights come back exactly."""
    paths = [str(kohya(tmp_path / f"{i}.safetensors", i)[0]) for i in range(4)]
    network = Small(dtype)
    before = snapshot(network)
    adapters = Adapters({"unet": network})
    rng = np.random.default_rng(0)
    for _ in range(200):
        picked = rng.choice(4, rng.integers(0, 4), replace=False)
        with wearing(adapters, *(LoraRef(paths[i], float(rng.uniform(-1, 4))) for i in picked)):
            assert identical(before, snapshot(network)) == (len(picked) == 0)
    adapters.restore()
    assert identical(before, snapshot(network))


def test_the_same_set_again_is_free(tmp_path):
    """A set that is on stays on: the weights are not touched, which their version counter proves."""
    path, _ = kohya(tmp_path / "a.safetensors")
    network = Small()
    adapters = Adapters({"unet": network})
    with wearing(adapters, LoraRef(str(path))):
        version = network.to_q.weight._version
    with wearing(adapters, LoraRef(str(path))):
        assert network.to_q.weight._version == version


def test_scale_zero_is_no_lora_at_all(tmp_path):
    """Strength 0 leaves every bit as it is."""
    path, _ = kohya(tmp_path / "a.safetensors")
    network = Small()
    before = snapshot(network)
    with wearing(Adapters({"unet": network}), LoraRef(str(path), 0.0)):
        assert identical(before, snapshot(network))


def bad_files(folder):
    """Name -> (file, a phrase of the error)."""
    down, up = low_rank(6, 5, 2)
    good = {"lora_unet_to_q.lora_down.weight": down, "lora_unet_to_q.lora_up.weight": up}
    other = {"lora_unet_other.lora_down.weight": down, "lora_unet_other.lora_up.weight": up}
    cases = {
        "another model": (good | other, "not for this model: 1 of 2"),
        "not low-rank": ({"lora_unet_to_q.hada_w1_a": down}, "low-rank LoRAs"),
        "half a pair": ({"lora_unet_to_q.lora_down.weight": down}, "incomplete"),
        "not finite": (good | {"lora_unet_to_q.lora_up.weight": up / 0}, "not finite"),
        "rank mismatch": (good | {"lora_unet_to_q.lora_up.weight": up[:, :1].contiguous()}, "does not fit"),
        "wrong shape": (good | {"lora_unet_to_q.lora_down.weight": down[:, :3].contiguous()}, "does not fit"),
        "one axis": (good | {"lora_unet_to_q.lora_up.weight": up[:, 0].contiguous()}, "malformed"),
        "zero size": (
            {
                "lora_unet_to_q.lora_down.weight": torch.zeros(0, 5),
                "lora_unet_to_q.lora_up.weight": torch.zeros(6, 0),
            },
            "malformed",
        ),
        "empty": ({}, "no tensors"),
        "one module in two spellings": (
            good | {k.replace("lora_unet_to_q", "unet.to_q"): t for k, t in good.items()},
            "two spellings",
        ),
        "one tensor in two spellings": (good | {"lora_unet_to_q.lora_A.weight": down}, "two 'down' tensors"),
        "alpha of two numbers": (good | {"lora_unet_to_q.alpha": torch.ones(2)}, "not one number"),
    }
    for name, (tensors, phrase) in cases.items():
        path = folder / f"{name}.safetensors"
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
        yield name, path, phrase
    for name, data in (("a web page", b"<!doctype html><html>" * 9), ("a pickle", b"\x80\x04" * 50), ("nothing", b"")):
        path = folder / f"{name}.safetensors"
        path.write_bytes(data)
        yield name, path, "not a safetensors file"
    yield "missing", folder / "missing.safetensors", "not found"


def test_files_that_do_not_work_are_refused_with_the_reason(tmp_path):
    """Each broken or foreign file is an error that names the field and the cause, and the weights stay the model's."""
    network = Small()
    before = snapshot(network)
    adapters = Adapters({"unet": network})
    good, _ = kohya(tmp_path / "good.safetensors")
    seen = 0
    for name, path, phrase in bad_files(tmp_path):
        with (
            pytest.raises(LoraError, match=phrase) as caught,
            wearing(adapters, LoraRef(str(good)), LoraRef(str(path))),
        ):
            raise AssertionError(f"{name} was accepted")
        assert caught.value.field == "loras.1.path", name
        assert identical(before, snapshot(network)), name
        seen += 1
    assert seen == 16


def test_an_exception_in_the_middle_of_patching_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    """Out of memory after the first module: the weights are the model's own, and the next request gets them."""
    path, _ = kohya(tmp_path / "a.safetensors")
    network = Small()
    before = snapshot(network)
    adapters = Adapters({"unet": network})
    delta, calls = LowRank.delta, []

    def fails_at_the_second(self, shape):
        calls.append(shape)
        if len(calls) == 2:
            raise MemoryError
        return delta(self, shape)

    monkeypatch.setattr(LowRank, "delta", fails_at_the_second)
    with pytest.raises(MemoryError), wearing(adapters, LoraRef(str(path))):
        raise AssertionError("not reached")
    assert identical(before, snapshot(network))
    with wearing(adapters):
        assert identical(before, snapshot(network))
    with wearing(adapters, LoraRef(str(path))):
        assert not identical(before, snapshot(network))


def test_a_file_replaced_on_disk_is_another_lora(tmp_path):
    """The next request uses the new file, not what was read before."""
    path, first = kohya(tmp_path / "a.safetensors", 1)
    network = Small()
    base = network.to_q.weight.clone()
    adapters = Adapters({"unet": network})
    with wearing(adapters, LoraRef(str(path))):
        torch.testing.assert_close(network.to_q.weight, base + first, rtol=1e-5, atol=1e-5)
    path.unlink()
    _, second = kohya(path, 30)
    with wearing(adapters, LoraRef(str(path))):
        torch.testing.assert_close(network.to_q.weight, base + second, rtol=1e-5, atol=1e-5)
